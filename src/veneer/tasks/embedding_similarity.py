"""Similarity of two texts: the squared error between a rating and the cosine of their embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.task import Batch, Between, nothing
from veneer.tasks.measures.scores import check_packages, of_numbers
from veneer.tasks.text.vectors import Pooling, Vectors

NAME = "embedding-similarity"


class EmbeddingSimilarity(Vectors):
    """Rated pairs of texts, measured by Spearman's correlation of rating and cosine.

    pooling: vector of a text: the mean of its hidden states, or that of the first or the last token
    most: rating of texts of equal meaning, which a cosine of 1 stands for
    """

    METRIC = Metric("spearman", "Spearman correlation", lower_is_better=False)
    FORMS = {
        "rated": ("text_a", "text_b", "score"),
        "sentences": ("sentence1", "sentence2", "score"),
        "labelled-pair": ("sentence1", "sentence2", "label"),
    }

    def __init__(
        self, processor: Any, reading: Reading, *, pooling: Pooling = "mean", most: float = 1.0
    ) -> None:
        check_packages(NAME, {"scipy": "scipy"})
        super().__init__(processor, reading, pooling=pooling)
        if most <= 0:
            raise ConfigError(f"most must be above 0, got {most:g}")
        self.most = most

    def encode(self, row: Row) -> Encoded:
        given = row.columns[self.FORMS[row.kind][2]]
        rating = float(given) if isinstance(given, (int, float)) else math.nan
        if not 0 <= rating <= self.most:
            raise DataError(f"{row.where}: rating must be a number from 0 to {self.most:g}, got {given!r}")
        one = super().encode(row)
        return one._replace(content={**one.content, "target": torch.tensor(rating / self.most)})

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        first, other = self.vectors(model, batch)
        errors = (first * other).sum(-1) - batch["target"]
        return errors.square().sum(), len(errors)

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        first, other = self.all_vectors(model, examples, batch, between)
        pearson, spearman, squared = of_numbers(
            torch.stack([e["target"] for e in examples]), (first * other).sum(-1)
        )
        return [spearman, pearson, squared]
