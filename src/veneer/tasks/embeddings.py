"""Embeddings of texts: a text and its partner are nearer than the partners of the other texts of a batch.

InfoNCE, van den Oord et al. 2018, equation 4, https://arxiv.org/abs/1807.03748, with cosines over a
temperature. Larger batches have more texts to tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.data.reading import Reading
from veneer.errors import ConfigError
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.task import Batch, Between, nothing
from veneer.tasks.text.vectors import Pooling, Vectors


class Embeddings(Vectors):
    """Pairs of texts that belong together, measured by the share whose partner is the nearest of all.

    pooling: vector of a text: the mean of its hidden states, or that of the first or the last token
    temperature: divides the cosines
    """

    COMPARES = True
    METRIC = Metric("nearest", "share of texts nearest to their partner", lower_is_better=False)
    FORMS = {
        "partners": ("anchor", "positive"),
        "query": ("query", "positive"),
        "pair-of-texts": ("text_a", "text_b"),
        "question": ("question", "answer"),
    }

    def __init__(
        self, processor: Any, reading: Reading, *, pooling: Pooling = "mean", temperature: float = 0.05
    ) -> None:
        super().__init__(processor, reading, pooling=pooling)
        if temperature <= 0:
            raise ConfigError(f"temperature must be above 0, got {temperature:g}")
        self.temperature = temperature

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        first, other = self.vectors(model, batch)
        cosines = first @ other.T / self.temperature
        own = torch.arange(len(first), device=cosines.device)
        return F.cross_entropy(cosines, own, reduction="sum"), len(first)

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
        cosines = first @ other.T
        own = torch.arange(len(first))
        right = (cosines.argmax(1) == own).double()
        ranks = (cosines >= cosines[own, own][:, None]).sum(1).double()
        ones = torch.ones_like(right)
        mean_rank = Metric("mrr", "mean reciprocal rank", lower_is_better=False)
        return [Figure.of(self.METRIC, right, ones), Figure.of(mean_rank, 1 / ranks, ones)]
