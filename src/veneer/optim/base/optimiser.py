"""What every optimiser is: options that are checked when it is chosen, and a torch optimiser made for what is
trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch

from veneer.errors import ConfigError
from veneer.optim.base.groups import Part


class Trained(NamedTuple):
    """What an optimiser is made for. betas: decay rates of moments; embedding: the rate of what changes
    embeddings, in rates."""

    parts: Sequence[Part]
    betas: tuple[float, float] = (0.9, 0.999)
    embedding: float = 1.0


class Optimiser(ABC):
    """One way to step. Its options are the keyword parameters of __init__(self, *, ..): flags and files are
    made from them.

    needs: the roles that a method must have; doubts: what has to be allowed by name, as {check: sentence}.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    doubts: Mapping[str, str] = {}

    @property
    def rated_as(self) -> str:
        """The name under which train/rates.py has its rates: its own, unless a form of it wants others."""
        return type(self).__module__.rsplit(".", 1)[-1].replace("_", "-")

    @abstractmethod
    def build(self, trained: Trained) -> torch.optim.Optimizer:
        """The torch optimiser, whose groups `groups.set_rates` sets before each step and whose state is
        tensors alone."""

    def state_bytes(self, trained: Trained) -> int:
        """What its state takes: two numbers for each that is trained, and a count of steps for each
        tensor."""
        every = [p.parameter for p in trained.parts]
        return sum(2 * p.numel() * p.element_size() + 4 for p in every)

    def announcement(self, trained: Trained) -> str | None:
        """What whoever starts it should know before."""
        return None


def check_damping(damping: float) -> float:
    """The damping of Gram matrices, if it is 0 or more. Raises ConfigError."""
    if not damping >= 0:
        raise ConfigError(f"damping {damping:g} must be 0 or more")
    return damping
