"""Decompositions by the second moment of a layer's inputs: their main directions, and W seen through them."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.matrix.linalg import symmetric
from veneer.ops.matrix.sketch import Svd

DAMP = 1e-3  # of the mean diagonal, added to it


def directions(C: Tensor, rank: int) -> Svd:
    """Returns the leading `rank` right singular triplets of X from C = X'X (in, in); U is empty."""
    w, Q = symmetric(C)
    kept = w.flip(0)[:rank].clamp_min(0).sqrt()
    return Svd(C.new_empty(0, len(kept)), kept, Q.flip(1)[:, :rank].mT.contiguous())


def oriented(W: Tensor, C: Tensor, rank: int) -> tuple[Svd, Svd]:
    """Returns the leading and the least `rank` parts U S V' C^-1 of W (out, in), from U S V' = W C."""
    C = C + DAMP * C.diagonal().mean().clamp_min(torch.finfo(C.dtype).tiny) * torch.eye(
        len(C), dtype=C.dtype, device=C.device
    )
    U, S, Vh = torch.linalg.svd(W.to(C) @ C, full_matrices=False)
    rows = torch.linalg.solve(C, Vh.mT).mT
    return Svd(U[:, :rank], S[:rank], rows[:rank]), Svd(U[:, -rank:], S[-rank:], rows[-rank:])
