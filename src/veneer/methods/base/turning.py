"""Changes that turn a layer's input: W' = g * (W R'), with R near the identity."""

from __future__ import annotations

from abc import abstractmethod
from typing import final

from torch import Tensor

from veneer.methods.base.delta import Delta
from veneer.methods.base.factors import ROWWISE
from veneer.methods.base.protocols import AddsInPlace, Dialled, TurnsInput
from veneer.sites import Site


class Turning(Delta, TurnsInput, Dialled, AddsInPlace):
    """y = g * W (x R) + bias, rows of numbers x. The method states turn(), and gain() if it scales rows.

    An embedding's outputs are turned in place of its token ids. At strength t the generator of R is
    multiplied by t, so R stays a rotation, and at 0 the change is exactly zero. Alone and in full the change
    costs the turn of the input. At other strengths, beside other changes and on convolutions it costs another
    product of W's size.
    """

    @abstractmethod
    def turn(self, T: Tensor, strength: float, *, back: bool = False) -> Tensor:
        """Returns T (R - I) at this strength, or T (R' - I) with back=True: T (.., in) or, for an embedding,
        (.., out)."""

    def gain(self, strength: float) -> Tensor | None:
        """Returns the gains of rows g (out,) at this strength, or None for 1."""
        return None

    @final
    def delta(self, site: Site) -> Tensor:
        return self.delta_at(site, 1.0)

    @final
    def delta_at(self, site: Site, strength: float) -> Tensor:
        W = site.weight().to(next(self.parameters()).dtype)
        g = self.gain(strength)
        if site.kind == "embedding":
            change = self.turn(W.mT, strength).mT
        else:
            change = self.turn(W, strength, back=True)
        return change if g is None else change + (g - 1)[:, None] * (W + change)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return self.forward_at(x, y, site, 1.0)

    @final
    def forward_at(self, x: Tensor, y: Tensor, site: Site, strength: float) -> Tensor:
        g = self.gain(strength)
        if site.kind == "embedding":
            change = self.turn(y, strength)
        elif site.kind in ROWWISE:
            change = site.apply(self.turn(x.to(y.dtype), strength), site.weight().to(y.dtype))
        else:
            return site.apply(x.to(y.dtype), self.delta_at(site, strength).to(y.dtype))
        return change if g is None else change + self._gained(y, change, site, g)

    def _gained(self, y: Tensor, change: Tensor | float, site: Site, g: Tensor) -> Tensor:
        shift = site.shift()
        own = y if shift is None else y - shift
        return (g - 1).to(y.dtype) * (own + change)

    @final
    def turned(self, x: Tensor, site: Site) -> Tensor | None:
        return x + self.turn(x, 1.0) if site.kind in ROWWISE else None

    @final
    def onto(self, x: Tensor, y: Tensor, site: Site, *, writable: bool) -> Tensor:
        if site.kind not in ROWWISE:
            return y + self.forward_at(x, y, site, 1.0)
        g = self.gain(1.0)  # of a layer whose input has been turned
        return y if g is None else y + self._gained(y, 0.0, site, g)


def turned_size(site: Site) -> int:
    """Returns the length of the vectors that are turned: the inputs, or an embedding's outputs."""
    return site.out if site.kind == "embedding" else site.in_
