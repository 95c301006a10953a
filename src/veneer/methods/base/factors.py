"""The normal form of a change: factors and gains, or products with W."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.sites import Site

ROWWISE = (
    "linear",
    "transposed",
    "parameter",
)  # kinds of site that map vectors one by one, along the last dimension of x


class Factors(NamedTuple):
    """The normal form  y = g * (W (c * x) + B A (c * x)) + bias.

    A: (r, in); B: (out, r) with all scaling folded in, r = 0 if there are only gains; g: (out,) or None for
    1;
    c: (in,) or None for 1.

    At strength t an adapter is W + t (W' - W). Several adapters add up their W' - W, whatever their gains. A
    change with c that acts alone at strength 1 costs one product of x with c in front of the layer. At any
    other strength, beside other changes and on layers that do not map vectors one by one, its W' - W is built
    and applied: equally exact, for another product of the base's size.
    """

    A: Tensor
    B: Tensor
    g: Tensor | None = None
    c: Tensor | None = None

    @property
    def is_product(self) -> bool:
        """True if W' - W is B A alone."""
        return self.g is None and self.c is None

    def dense(self, site: Site) -> Tensor:
        """Returns W' - W (out, in), differentiable."""
        D = self.B @ self.A
        gain = None if self.g is None else self.g[:, None]
        if self.c is not None:
            gain = self.c if gain is None else gain * self.c
        return D if gain is None else (gain - 1) * site.weight().to(D.dtype) + gain * D

    def added(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Returns the change of the layer's own output y for its input x, which has y's dtype or holds token
        ids."""
        if self.c is not None:
            return site.apply(x, self.dense(site).to(y.dtype))
        if not self.A.shape[0]:
            change = torch.zeros_like(y)
        elif site.factored:
            change = site.mix(site.apply(x, self.A.to(y.dtype)), self.B.to(y.dtype))
        else:
            change = site.apply(x, (self.B @ self.A).to(y.dtype))
        if self.g is None:
            return change
        shift = site.shift()
        own = y if shift is None else y - shift
        return site.rows((self.g - 1).to(y.dtype)) * own + site.rows(self.g.to(y.dtype)) * change


class Products(NamedTuple):
    """y = g * W x + sum_k b_k * W (a_k * x) + bias: a bank serves it by products with W of each row's own
    inputs.

    g: (out,); a: (s, in); b: (s, out).
    """

    g: Tensor
    a: Tensor
    b: Tensor
