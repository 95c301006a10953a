"""First and second moments of the inputs of a block's layers and of the gradients at their outputs, one pass
at a time.

Layers that read the same tensor share one set. Sums are kept in float32 at least; padding is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ops.matrix.linalg import precise
from veneer.sites import Site


@dataclass
class Moments:
    """n rows were summed: total (d,) of x, second (d, d) of x x'."""

    n: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor) -> None:
        """Takes rows x (rows, d) into the sums."""
        x = precise(x)
        self.n += len(x)
        self.total = self.total + x.sum(0, dtype=torch.float64)
        self.second = self.second.to(x.dtype) + x.mT @ x

    @property
    def mean(self) -> Tensor:
        """E[x] (d,) in float64."""
        return self.total / max(self.n, 1)

    def moment(self, centred: bool = False) -> Tensor:
        """E[x x'] (d, d) in float64, of x less its mean if centred."""
        M = self.second.double() / max(self.n, 1)
        return M - torch.outer(self.mean, self.mean) if centred else M


class Watch:
    """The block's layers, hooked: `inputs` and `slopes` hold the moments by layer; layers of one input share
    theirs.
    """

    def __init__(self, sites: Mapping[str, Site], slopes: bool = False) -> None:
        self.sites, self.with_slopes = sites, slopes
        self.inputs: dict[str, Moments] = {}
        self.slopes: dict[str, Moments] = {n: Moments() for n in sites} if slopes else {}
        self.mask: Tensor | None = None
        self._last: tuple[Tensor, int, Moments] | None = None

    @contextmanager
    def over(self, mask: Tensor | None) -> Iterator[None]:
        """Within the block calls of the layers are summed over the rows of the mask (b, t), or all."""
        self.mask, self._last = mask, None
        handles = [s.module.register_forward_hook(self._hook(n)) for n, s in self.sites.items()]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            x = args[0]
            if self._last is not None and self._last[0] is x and self._last[1] == x._version:
                self.inputs[name] = self._last[2]
            else:
                own = self.inputs.setdefault(name, Moments())
                own.add(rows(x.detach(), self.mask))
                self._last = (x, x._version, own)
            if self.with_slopes:
                y.register_hook(lambda g: self.slopes[name].add(rows(g, self.mask)))

        return hook


def rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (b, t, d), or any shape (.., d), as the rows (n, d) that the mask (b, t) leaves."""
    if mask is None or x.shape[:-1].numel() != mask.numel():
        return x.reshape(-1, x.shape[-1])
    return x.reshape(-1, x.shape[-1])[mask.reshape(-1)]
