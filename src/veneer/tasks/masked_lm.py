"""Masked language modelling: the cross-entropy of hidden tokens, as BERT learns them.

Devlin et al. 2019, section 3.1, https://arxiv.org/abs/1810.04805. 15 % of the tokens of a window are hidden:
80 % of them by the mask, 10 % by a random token, 10 % not at all. They are drawn anew in every pass of a
training (Liu et al. 2019, https://arxiv.org/abs/1907.11692), and always alike where a text is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.tasks.base.abilities import Draws, Outlined
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.shape import Counted, Shape
from veneer.tasks.base.task import Batch, Between, batches, nothing
from veneer.tasks.measures.scores import ACCURACY
from veneer.tasks.text.padded import IGNORED, Padded

NAME = "masked-lm"
MASKED, KEPT = 0.8, 0.1  # shares of the hidden tokens that are replaced by the mask, and left unchanged


class MaskedLM(Padded, Outlined, Draws):
    """Texts with hidden tokens, measured by the nats of a hidden token.

    share: of the tokens of a window that are hidden
    """

    AUTO = "transformers.AutoModelForMaskedLM"
    PIPELINE = "fill-mask"
    METRIC = Metric("nats", "nats per hidden token")
    SETTINGS = ("length", "label_smoothing")
    EXAMPLE = "window"
    FIXED = False

    def __init__(self, processor: Any, reading: Reading, *, share: float = 0.15) -> None:
        super().__init__(processor, reading)
        if processor.mask_token_id is None:
            raise ConfigError(f"task {NAME!r} needs a tokenizer with a mask token; use task 'causal-lm'")
        if not 0 < share < 1:
            raise ConfigError(f"share must be between 0 and 1, got {share:g}")
        self.share = share
        outer = [
            (processor.cls_token_id, processor.bos_token_id),
            (processor.sep_token_id, processor.eos_token_id),
        ]
        self.ends = [next((i for i in some if i is not None), None) for some in outer]

    def encode(self, row: Row) -> Encoded:
        if row.kind != "text":
            raise DataError(f"{row.where}: must be a text, got {row.kind!r}; give a column 'text'")
        ids = self.processor(row.columns["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return Encoded(row, torch.tensor(ids, dtype=torch.int64))

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        first, last = (torch.tensor([] if i is None else [i], dtype=torch.int64) for i in self.ends)
        room = max(1, window - len(first) - len(last))
        parts = [p for p in one.content.split(room) if len(p) > 1]
        return [{"input_ids": torch.cat([first, p, last])} for p in parts]

    def labels(self, example: Mapping[str, Tensor]) -> int:
        own = self.size(example) - sum(i is not None for i in self.ends)
        return max(1, round(self.share * own))

    def hidden(self, batch: Batch, draw: torch.Generator | None = None) -> dict[str, Tensor]:
        """Returns the batch with hidden tokens and their labels. draw: torch's own generator unless given."""
        ids, labels = batch["input_ids"].clone(), torch.full_like(batch["input_ids"], IGNORED)
        sizes = batch["attention_mask"].sum(1).tolist()
        lead, own = int(self.ends[0] is not None), sum(i is not None for i in self.ends)
        for row, size in enumerate(sizes):
            n = max(1, round(self.share * (size - own)))
            at = lead + torch.randperm(size - own, generator=draw)[:n].to(ids.device)
            labels[row, at] = ids[row, at]
            ids[row, at] = self._shown(ids[row, at], draw)
        return {**batch, "input_ids": ids, "labels": labels}

    def drawn(self, examples: Sequence[Any]) -> list[Any]:
        whole = self.hidden(self.collate(examples))
        sizes = map(self.size, examples)
        return [{k: whole[k][i, :n] for k in ("input_ids", "labels")} for i, n in enumerate(sizes)]

    def _shown(self, ids: Tensor, draw: torch.Generator | None) -> Tensor:
        kind = torch.rand(len(ids), generator=draw).to(ids.device)
        other = torch.randint(len(self.processor), (len(ids),), generator=draw).to(ids.device)
        seen = torch.where(kind < MASKED + KEPT, ids, other)
        return torch.where(kind < MASKED, self.processor.mask_token_id, seen)

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        logits, labels = self._logits(model, batch if "labels" in batch else self.hidden(batch))
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing), len(labels)

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        learned = batch["labels"] != IGNORED
        return model(**self.inputs(batch)).logits[learned].float(), batch["labels"][learned]

    def outline(self, model: nn.Module, shape: Shape, device: torch.device, counted: Counted) -> Tensor:
        ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.int64, device=device)
        total: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().sum()
        return total

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        parts: list[Tensor] = []
        with evaluating(model):
            for some, inputs in batches(self, model, examples, batch, between):
                hidden = [self.hidden(_row(inputs, i), _draw(e)) for i, e in enumerate(some)]
                whole = {name: torch.cat([h[name] for h in hidden]) for name in hidden[0]}
                logits, labels = self._logits(model, whole)
                owner = (whole["labels"] != IGNORED).nonzero()[:, 0]
                nats = F.cross_entropy(logits, labels, reduction="none")
                each_one = torch.stack([nats, (logits.argmax(-1) == labels).float(), torch.ones_like(nats)])
                parts.append(
                    torch.zeros(3, len(some), device=nats.device).index_add_(1, owner, each_one).cpu()
                )
        nats, right, n = torch.cat(parts, 1).double()
        return [Figure.of(self.METRIC, nats, n), Figure.of(ACCURACY, right, n)]


def _row(batch: Batch, i: int) -> dict[str, Tensor]:
    return {name: t[i : i + 1] for name, t in batch.items()}


def _draw(example: Mapping[str, Tensor]) -> torch.Generator:
    """Returns draws that depend on the tokens alone."""
    ids = example["input_ids"]
    return torch.Generator().manual_seed(int((ids * (torch.arange(len(ids)) + 1)).sum()))
