"""Regression: a number for a text, learned by the squared error of a model with one output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.row_files import Row
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.task import Batch, Between, Task, batches, nothing


class ToyRegression(Task):
    AUTO = "transformers.AutoModelForSequenceClassification"
    PIPELINE = "text-classification"
    METRIC = Metric("mse", "mean squared error")
    FORMS = {"rated": ("text", "score")}

    def encode(self, row: Row) -> Encoded:
        ids = torch.tensor(self.processor(row.columns["text"])["input_ids"])
        return Encoded(row, {"ids": ids, "score": torch.tensor(float(row.columns["score"]))}, len(ids))

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        return [{**one.content, "ids": one.content["ids"][:window]}]

    def size(self, example: dict[str, Tensor]) -> int:
        return len(example["ids"])

    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        t, pad = self.width(examples, widths), self.processor.pad_token_id
        ids = torch.stack([nn.functional.pad(e["ids"], (0, t - len(e["ids"])), value=pad) for e in examples])
        mask = torch.stack([(torch.arange(t) < len(e["ids"])).long() for e in examples])
        return dict(input_ids=ids, attention_mask=mask, labels=torch.stack([e["score"] for e in examples]))

    def errors(self, model: nn.Module, batch: Batch) -> Tensor:
        return (model(**self.inputs(batch)).logits[:, 0].float() - batch["labels"]).square()

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        errors = self.errors(model, batch)
        return errors.sum(), len(errors)

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
        with evaluating(model):
            found = [self.errors(model, b) for _, b in batches(self, model, examples, batch, between)]
        parts = torch.cat(found).double().cpu()
        return [Figure.of(self.METRIC, parts, torch.ones_like(parts))]
