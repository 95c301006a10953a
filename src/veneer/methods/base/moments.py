"""Sums the second moments X'X of layers' inputs during a calibration."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.methods.base.factors import ROWWISE
from veneer.methods.base.stats import Stats
from veneer.ops.matrix.moments import directions, oriented
from veneer.sites import Site


class Moments:
    """X'X (in, in) in float64 by layer; layers that read one tensor share one sum."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.last: tuple[weakref.ref[Tensor], Tensor] | None = None

    def see(self, x: Tensor, site: Site) -> None:
        """Adds the rows of the layer's input x to its sum; skips layers whose rows differ by group."""
        if site.kind not in ROWWISE and not site.factored:
            return
        own = self.sums.get(site.name)
        if self.last is not None and self.last[0]() is x and own in (None, self.last[1]):
            self.sums[site.name] = self.last[1]
            return
        rows = _rows(x, site)
        C = rows.mT @ rows
        self.sums[site.name] = C if own is None else own.add_(C)
        self.last = (weakref.ref(x), self.sums[site.name])

    def joined(self, stats: Mapping[str, Stats], sites: Sequence[Site], rank: int) -> dict[str, Stats]:
        """Returns the statistics with those of the inputs, for at most `rank` directions."""
        found, summed = dict(stats), dict[int, Tensor]()
        for site in sites:
            C = self.sums.get(site.name)
            if C is None or site.name not in found:
                continue
            if id(C) not in summed:
                summed[id(C)] = over_processes(C)
            C, q = summed[id(C)], min(rank, site.out, site.in_)
            W = site.weight().detach()
            found[site.name] = found[site.name]._replace(
                inputs=(directions(C, q),), oriented=oriented(W, C, q)
            )
        return found


def _rows(x: Tensor, site: Site) -> Tensor:
    """Returns the vectors (n, in) that the layer multiplies by W, in float64."""
    if site.kind in ROWWISE:
        return x.flatten(0, -2).double()
    if not x.is_floating_point():
        return F.one_hot(x.flatten(), site.in_).double()
    patches = site.apply(x.double(), torch.eye(site.in_, dtype=torch.float64, device=x.device))
    return patches.movedim(1, -1).flatten(0, -2)


def over_processes(total: Tensor) -> Tensor:
    """Sums over all processes in place and returns the tensor."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total
