"""Runs a model on one packed row of many sequences' tokens: prompts in chunks and newest tokens, in one
step.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.adapt.banks.program import Terms
from veneer.adapt.banks.segments import SegmentBank
from veneer.serve.engine.steps.attention import ATTENTION, Held, Step, attending
from veneer.serve.engine.steps.lanes import Lane, capacity


class Work(NamedTuple):
    """Tokens of one sequence in this step. sampled: 0 for none, 1 for the last token's logits, -1 for all
    tokens'.
    """

    held: Held
    tokens: Sequence[int]
    terms: Terms
    sampled: int


class Packed:
    """A model that computes packed steps."""

    static = False

    def __init__(self, model: Any, bank: SegmentBank) -> None:
        self.model, self.bank = model, bank
        self.before = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)
        self.lanes: dict[int, Lane] = {}
        self.selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def close(self) -> None:
        """Gives the model its own attention back."""
        self.model.set_attn_implementation(self.before)

    def start(self, prompt_tokens: int) -> Held:
        """Returns an empty cache for a prompt."""
        return Held(prompt_tokens)

    def _enter(self, held: Held, length: int) -> None:
        """Moves a sequence into the lane for a length, where it is not there."""
        size = capacity(length)
        if held.lane is not None and held.lane.tokens == size:
            return
        lane = self.lanes.setdefault(size, Lane(size))
        layers = sorted((held.strip or held.lane).layers)  # type: ignore[union-attr]
        old = held.lane
        lane.enter(held, held.length, held.source, layers)
        if old is not None:
            old.leave(held)
        held.strip, held.lane = None, lane

    def drop(self, held: Held) -> None:
        """Frees a sequence's cache."""
        if held.lane is not None:
            held.lane.leave(held)
        held.strip = held.lane = None

    def reset(self) -> None:
        """Forgets all sequences."""
        self.lanes = {}
        self.bank.use()

    @property
    def bytes(self) -> int:
        """Bytes of all lanes."""
        return sum(lane.bytes for lane in self.lanes.values())

    @torch.inference_mode()
    def step(self, works: Sequence[Work], *, decoding: Sequence[bool]) -> list[Tensor | None]:
        """Computes the tokens of all sequences, and returns the logits that each wants: (1 or tokens,
        vocabulary).

        decoding[i]: works[i] is the newest token of an answer; every sequence in a lane must be among these.
        """
        order = sorted(range(len(works)), key=lambda i: [(p.stack, p.place, s) for p, s in works[i].terms])
        for i in order:
            if decoding[i]:
                self._enter(works[i].held, works[i].held.length + 1)
        starts, tokens, positions = self._lay_out(works, order)
        step = self._plan(works, starts, decoding)
        wanted = [
            range(starts[i] + (len(w.tokens) - 1 if w.sampled > 0 else 0), starts[i] + len(w.tokens))
            if (w := works[i]).sampled
            else range(0)
            for i in order
        ]
        self.bank.use(
            [(works[i].terms, len(works[i].tokens)) for i in order],
            [(works[i].terms, len(rows)) for i, rows in zip(order, wanted, strict=True)],
        )
        logits = self._forward(step, tokens, positions, [r for rows in wanted for r in rows])
        for w in works:
            w.held.length += len(w.tokens)
        found: list[Tensor | None] = [None] * len(works)
        at = 0
        for i, rows in zip(order, wanted, strict=True):
            found[i] = logits[at : at + len(rows)] if len(rows) else None
            at += len(rows)
        return found

    def _lay_out(
        self, works: Sequence[Work], order: Sequence[int]
    ) -> tuple[dict[int, int], list[int], list[int]]:
        starts: dict[int, int] = {}
        tokens: list[int] = []
        positions: list[int] = []
        for i in order:
            w = works[i]
            starts[i] = len(tokens)
            tokens += w.tokens
            positions += range(w.held.length, w.held.length + len(w.tokens))
        return starts, tokens, positions

    def _plan(self, works: Sequence[Work], starts: dict[int, int], decoding: Sequence[bool]) -> Step:
        place = {id(w.held): starts[i] for i, w in enumerate(works)}
        lanes = [lane for lane in self.lanes.values() if lane.owners]
        for lane in lanes:
            lane.lengths = [held.length + 1 for held in lane.owners]  # type: ignore[attr-defined]
        chunks = [(w.held, starts[i], len(w.tokens)) for i, w in enumerate(works) if not decoding[i]]
        return Step(
            chunks, [(lane, [place[id(held)] for held in lane.owners]) for lane in lanes], self.model.device
        )

    def _forward(self, step: Step, tokens: list[int], positions: list[int], rows: list[int]) -> Tensor:
        device = self.model.device
        keep = torch.tensor(rows, dtype=torch.long, device=device)
        given: dict[str, Any] = {"logits_to_keep": keep} if self.selects else {}
        with attending(step) as cache:
            out: Tensor = self.model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([positions], device=device),
                past_key_values=cache,
                use_cache=True,
                **given,
            ).logits[0]
        return out if self.selects else out[keep]
