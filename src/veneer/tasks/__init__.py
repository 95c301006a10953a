"""One objective, one file; the file's name is the objective's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from veneer.registry import Registry

OBJECTIVES = Registry(__name__, "objective")
Batch = Mapping[str, Tensor]


class Objective(Protocol):
    """What a training lowers and an evaluation measures."""

    def __call__(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        """Sum of the losses in nats, and the number of labels. smoothing: share of each label that is spread over all."""


def available() -> list[str]:
    """Names of all objectives."""
    return OBJECTIVES.names()


def get(name: str) -> Objective:
    """The function `loss` of an objective's file. Raises ConfigError for an unknown one."""
    found: Objective = OBJECTIVES.module(name).loss
    return found
