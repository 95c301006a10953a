"""One objective, one file; the file's name is the objective's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from veneer.registry import Registry

OBJECTIVES = Registry(__name__, "objective")
Batch = Mapping[str, Tensor]
Objective = Callable[[nn.Module, Batch], tuple[Tensor, int]]  # -> sum of the losses in nats, number of labels


def available() -> list[str]:
    """Names of all objectives."""
    return OBJECTIVES.names()


def get(name: str) -> Objective:
    """The function `loss` of an objective's file. Raises ConfigError for an unknown one."""
    found: Objective = OBJECTIVES.module(name).loss
    return found
