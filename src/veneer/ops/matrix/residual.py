"""Q + U S V' ~ W with Q in few bits and U S V' of low rank, which compensates Q's error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ops import quant
from veneer.ops.matrix.linalg import leading_svd, precise
from veneer.ops.matrix.sketch import Svd


class Split(NamedTuple):
    """The packed Q, the low-rank part, and the relative error ||W - Q - U S V'|| / ||W||."""

    parts: quant.Parts
    low: Svd
    error: float


def split(
    W: Tensor, format: quant.Format, rank: int, *, iterations: int, draw: torch.Generator, whole_first: bool
) -> Split:
    """Returns the best of `iterations` alternations of Q = q(W - U S V') and the low-rank part of W - Q.

    W: (out, in). whole_first: whether the first U S V' is that of W itself (QPiSSA), and not zero (LoftQ).
    """
    out, in_ = W.shape
    W, dtype = precise(W), W.dtype
    low = _product(Svd(*leading_svd(W, rank, draw))) if whole_first else torch.zeros_like(W)
    best: Split | None = None
    for _ in range(iterations):
        parts = format.pack((W - low).to(dtype))
        missing = W - format.unpack(parts, (out, in_), W.dtype)
        found = Svd(*leading_svd(missing, rank, draw))
        low = _product(found)
        norm = float(W.norm())
        error = float((missing - low).norm()) / norm if norm else 0.0
        if best is None or error < best.error:
            best = Split(parts, found, error)
    assert best is not None
    return best


def _product(s: Svd) -> Tensor:
    return (s.U * s.S) @ s.Vh
