"""Base of all optimisers: checked options, and a torch optimiser for the trained parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch

from veneer.errors import ConfigError
from veneer.optim.base.groups import Part


class Trained(NamedTuple):
    """Input of an optimiser.

    betas: decay rates of moments. embedding: rate of embeddings relative to the rate.
    """

    parts: Sequence[Part]
    betas: tuple[float, float] = (0.9, 0.999)
    embedding: float = 1.0


class Optimiser(ABC):
    """An optimiser. Its options are the keyword parameters of __init__(self, *, ..).

    needs: the roles that a method must have; doubts: what has to be allowed by name, as {check: sentence}.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    doubts: Mapping[str, str] = {}

    @property
    def rated_as(self) -> str:
        """Returns the key of its rates in train/rates.py: its own name unless a form needs other rates."""
        return type(self).__module__.split(".")[-1].replace("_", "-")

    @abstractmethod
    def build(self, trained: Trained) -> torch.optim.Optimizer:
        """Returns the torch optimiser; `groups.set_rates` sets its groups, and its state is tensors only."""

    def state_bytes(self, trained: Trained, processes: int = 1) -> int:
        """Returns the bytes of its state in one of several processes, the most of them.

        Unless overridden: two numbers per trained one, and a step count per tensor.
        """
        every = [p.parameter for p in trained.parts]
        return sum(2 * p.numel() * p.element_size() + 4 for p in every)

    def shared_bytes(self, trained: Trained, processes: int) -> int:
        """Returns the bytes that each of several processes exchanges in a step, beside the gradients."""
        return 0

    def announcement(self, trained: Trained) -> str | None:
        """Returns a warning for the user before the training, or None."""
        return None


def check_damping(damping: float) -> float:
    """Returns the damping of Gram matrices. Raises ConfigError if it is negative."""
    if not damping >= 0:
        raise ConfigError(f"damping must be >= 0, got {damping:g}")
    return damping
