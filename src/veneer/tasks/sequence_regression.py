"""Regression on texts and on pairs of texts: the squared error of one number per row, as in STS-B."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import DataError
from veneer.tasks.base.figure import Figure
from veneer.tasks.base.task import Between, nothing
from veneer.tasks.measures.scores import PEARSON, check_packages, of_numbers
from veneer.tasks.text.padded import check_outputs
from veneer.tasks.text.sequences import Sequences

NAME = "sequence-regression"


class SequenceRegression(Sequences):
    """One number per row, measured by Pearson's correlation, beside Spearman's and the squared error."""

    METRIC = PEARSON

    def __init__(self, processor: Any, reading: Reading) -> None:
        check_packages(NAME, {"scipy": "scipy"})
        super().__init__(processor, reading)

    @classmethod
    def head_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_labels": 1}

    def model_options(self) -> dict[str, Any]:
        return {**super().model_options(), **self.head_options({})}

    def target(self, row: Row) -> Tensor:
        given = row.columns["label"]
        try:
            value = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{row.where}: label must be a finite number, got {given!r}")
        return torch.tensor(value)

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        super().check(model, examples)
        check_outputs(model, 1, "row")

    def errors(self, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
        return (logits[:, 0] - target).square()

    def decide(self, logits: Tensor) -> Tensor:
        return logits[0]

    def words(self, target: Tensor) -> str:
        return f"{float(target):.3g}"

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        answers = torch.stack([self.decide(a) for a in self.answers(model, examples, batch, between)])
        return of_numbers(torch.stack([e["target"] for e in examples]), answers)

    def examined(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> dict[str, Any]:
        return {"worst": self.worst(model, examples, self.answers(model, examples, batch))}
