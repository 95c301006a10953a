"""A running mean of the trained parameters (EMA), measured and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from veneer.optim.base.groups import Part

PREFIX = "m."


class Mean:
    """m <- decay m + (1 - decay) p after every step, in float32; it begins as the parameters do."""

    def __init__(self, parts: Sequence[Part], decay: float) -> None:
        self.parts, self.decay = parts, decay
        self.values = [part.parameter.detach().clone().float() for part in parts]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the mean towards the parameters."""
        for value, part in zip(self.values, self.parts, strict=True):
            value.lerp_(part.parameter.float(), 1 - self.decay)

    @torch.no_grad()
    def take(self) -> None:
        """Writes the mean into the parameters."""
        for value, part in zip(self.values, self.parts, strict=True):
            part.parameter.copy_(value)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Puts the mean in the parameters' place within the block."""
        before = [part.parameter.detach().clone() for part in self.parts]
        self.take()
        try:
            yield
        finally:
            with torch.no_grad():
                for part, value in zip(self.parts, before, strict=True):
                    part.parameter.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the mean for a checkpoint, as m.<name>."""
        return {f"{PREFIX}{part.name}": v for part, v in zip(self.parts, self.values, strict=True)}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Takes the mean from a checkpoint."""
        for value, part in zip(self.values, self.parts, strict=True):
            value.copy_(saved[f"{PREFIX}{part.name}"])
