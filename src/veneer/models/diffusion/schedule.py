"""The interface of a noise schedule: times of a training, noisy latents and their target, a sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Noised(NamedTuple):
    """Noisy latents (b, c, h, w) and the target of the prediction."""

    latents: Tensor
    target: Tensor


class Schedule(ABC):
    """A noise schedule of so many positions, from the configuration of a pipeline's scheduler."""

    positions: int

    @abstractmethod
    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ConfigError for a configuration of another objective."""

    @abstractmethod
    def times(self, positions: Tensor, tokens: int) -> Tensor:
        """Returns the times of positions (b,). tokens: patches of the latents."""

    @abstractmethod
    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Noised:
        """Returns latents (b, c, h, w) with the noise of their times (b,), and the target."""

    @abstractmethod
    def sampler(self, steps: int, tokens: int) -> Any:
        """Returns a scheduler of diffusers with so many `timesteps`."""
