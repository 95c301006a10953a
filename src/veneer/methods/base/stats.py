"""Statistics of a layer that an adapter may start from."""

from __future__ import annotations

from typing import NamedTuple

from veneer.ops.matrix.sketch import Svd


class Stats(NamedTuple):
    """Statistics of one layer, each for a matrix of the size of W (out, in).

    gradient: leading part of the loss's gradient in W, from calibration; residual: leading part of the
    quantisation error of W, and left: the share of W's norm in neither; leading: leading part of W itself;
    inputs: (the leading directions of the layer's inputs,); oriented: W's leading and least parts by their
    effect on the inputs.
    """

    gradient: Svd | None = None
    residual: Svd | None = None
    left: float | None = None
    leading: Svd | None = None
    inputs: tuple[Svd] | None = None
    oriented: tuple[Svd, Svd] | None = None
