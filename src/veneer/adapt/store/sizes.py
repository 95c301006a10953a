"""Measures the size of a change, and tells a change from rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.errors import NotMergeable
from veneer.methods import Delta
from veneer.methods.base.biased import Biased
from veneer.ops.matrix.linalg import product_norm, row_norms
from veneer.sites import Site


class Size(NamedTuple):
    """Frobenius norms of one site's change and of its W; `floor` is the norm that rounding alone can reach.

    The change of a method that cannot be written as weights (a bottleneck) is NaN: neither zero nor
    comparable.
    """

    change: float
    base: float
    floor: float

    @property
    def zero(self) -> bool:
        return self.change <= self.floor


@torch.no_grad()
def size(site: Site, delta: Delta) -> Size:
    """Returns the size of one change, without making the dense change of a product of factors."""
    base = float(row_norms(site.weight()).norm())
    if isinstance(delta, Biased):
        inner, b = size(site, delta.inner), float(delta.b.double().norm())
        return inner._replace(change=math.hypot(inner.change, b)) if b else inner
    f = delta.factors(site)
    if f is not None and f.is_product:
        # Factors can be large and their product nothing: orthogonal starts, PiSSA's start less itself.
        A, B = f.A.double(), f.B.double()
        return Size(float(product_norm(B, A)), base, torch.finfo(f.A.dtype).eps * float(A.norm() * B.norm()))
    D = dense(site, delta)
    if D is None:
        return Size(math.nan, base, 0.0)
    return Size(float(row_norms(D).norm()), base, 0.0)


def dense(site: Site, delta: Delta) -> Tensor | None:
    """Returns W' - W (out, in), or None for a method that cannot be written as weights."""
    try:
        return delta.delta(site)
    except NotMergeable:
        return None


def finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that hold a NaN or an infinity."""
    return [n for n, t in tensors.items() if not bool(torch.isfinite(t).all())]
