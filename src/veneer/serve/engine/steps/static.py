"""Runs a model on padded batches with transformers' own cache: for models whose attention packed steps cannot
take.

A batch begins when the one before has ended. Rows that have ended are taken out of the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from veneer.adapt.banks.segments import SegmentBank
from veneer.errors import ConfigError
from veneer.serve.engine.steps.packed import Work

CACHES = ("past_key_values", "cache_params")  # names that models have for their cache


class Row:
    """One sequence of the batch. length: tokens that were read."""

    def __init__(self) -> None:
        self.length = 0
        self.ended = False
        self.work: Work | None = None


class Static:
    """A model that computes one padded batch at a time."""

    static = True

    def __init__(self, model: Any, bank: SegmentBank) -> None:
        self.model, self.bank = model, bank
        parameters = inspect.signature(model.forward).parameters
        self.selects, self.places = "logits_to_keep" in parameters, "position_ids" in parameters
        self.remembers = next((n for n in CACHES if n in parameters), None)
        if self.remembers is None:
            raise ConfigError(f"{type(model).__name__} takes no cache; only models with one can be served")
        self.rows: list[Row] = []
        self.cache: Any = None
        self.mask: Tensor = torch.empty(0)

    def close(self) -> None:
        """Does nothing: the model is as it was."""

    def start(self, prompt_tokens: int) -> Row:
        """Returns an empty row."""
        return Row()

    def drop(self, held: Row) -> None:
        """Ends a row; the next step leaves it out."""
        held.ended = True

    def reset(self) -> None:
        """Forgets the batch."""
        self.rows, self.cache = [], None
        self.bank.use()

    @torch.inference_mode()
    def step(self, works: Sequence[Work], *, decoding: Sequence[bool]) -> list[Tensor | None]:
        """Computes the next tokens of all rows, and returns the logits that each wants: (1 or tokens,
        vocabulary).
        """
        if not any(decoding):
            self._begin(works)
        else:
            self._leave()
        for w in works:
            cast(Row, w.held).work = w
        width = max(len(w.tokens) for w in works)
        tokens, mask = self._padded(width)
        whole = any(w.sampled < 0 for w in works)
        rows = [r.work for r in self.rows if r.work is not None]
        self.bank.use([(w.terms, width) for w in rows], [(w.terms, width if whole else 1) for w in rows])
        logits = self._forward(tokens, mask, width if whole else 1)
        found = []
        for w in works:
            w.held.length += len(w.tokens)
            own = logits[self.rows.index(cast(Row, w.held))]
            found.append(own[-len(w.tokens) :] if w.sampled < 0 else own[-1:] if w.sampled else None)
        return found

    def _begin(self, works: Sequence[Work]) -> None:
        order = sorted(works, key=lambda w: [(p.stack, p.place, s) for p, s in w.terms])
        self.rows, self.cache = [cast(Row, w.held) for w in order], None
        self.mask = torch.ones(len(order), 0, dtype=torch.long, device=self.model.device)

    def _leave(self) -> None:
        """Takes ended rows out of the cache."""
        alive = [i for i, r in enumerate(self.rows) if not r.ended]
        if len(alive) < len(self.rows):
            index = torch.tensor(alive, device=self.model.device)
            self.cache.batch_select_indices(index)
            self.rows, self.mask = [self.rows[i] for i in alive], self.mask[index]

    def _padded(self, width: int) -> tuple[Tensor, Tensor]:
        """The rows' new tokens, (rows, width), with padding on the left, and where there are tokens."""
        tokens = torch.zeros(len(self.rows), width, dtype=torch.long)
        there = torch.zeros_like(tokens)
        for i, row in enumerate(self.rows):
            assert row.work is not None
            own = torch.tensor(row.work.tokens)
            tokens[i, width - len(own) :] = own
            there[i, width - len(own) :] = 1
        return tokens.to(self.model.device), there.to(self.model.device)

    def _forward(self, tokens: Tensor, there: Tensor, kept: int) -> Tensor:
        self.mask = torch.cat([self.mask, there], 1)
        given: dict[str, Any] = {"logits_to_keep": kept} if self.selects else {}
        if self.places:
            given["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        given[str(self.remembers)] = self.cache
        out = self.model(input_ids=tokens, attention_mask=self.mask, use_cache=True, **given)
        self.cache = getattr(out, str(self.remembers))
        logits: Tensor = out.logits
        return logits[:, -kept:]
