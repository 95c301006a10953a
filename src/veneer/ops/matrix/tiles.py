"""Changes of W that are affine in its square tiles."""

from __future__ import annotations

from torch import Tensor


def affine(W: Tensor, B: Tensor) -> Tensor:
    """Returns W_ij B_i + B_i at every tile: W (out, in), B (out / r, r, r) -> (out, in)."""
    n, r, _ = B.shape
    tiles = W.reshape(n, -1, r)  # (rows of tiles, r * columns of tiles, r): every row of a tile on its own
    change = (tiles @ B).view(n, r, -1, r) + B[:, :, None]
    return change.reshape(W.shape)
