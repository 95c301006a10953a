"""Powers of small symmetric matrices, many at once: what every preconditioner of A and B is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gram(NamedTuple):
    """S = Q diag(w) Q' of symmetric S (.., r, r) without negative eigenvalues: w (.., r), Q (.., r, r)."""

    w: Tensor
    Q: Tensor

    @property
    def mean(self) -> Tensor:
        """tr(S) / r (.., 1, 1)."""
        return self.w.mean(-1)[..., None, None]

    def power(self, exponent: float, damping: Tensor | float = 0.0) -> Tensor:
        """(S + damping)^exponent (.., r, r) on the range of S and zero elsewhere; damping: a number or (..,
        1, 1).

        The range ends at 10 r eps times the largest eigenvalue: below, a Gram matrix holds rounding errors
        alone.
        """
        w, Q = self
        shift = damping[..., 0] if isinstance(damping, Tensor) else damping
        there = w > 10 * w.shape[-1] * torch.finfo(w.dtype).eps * w[..., -1:]  # eigenvalues rise
        scaled = torch.where(there, torch.where(there, w + shift, 1.0).pow(exponent), 0.0)
        return (Q * scaled[..., None, :]) @ Q.mT


def gram(S: Tensor) -> Gram:
    """The spectrum of S (.., r, r), which is made symmetric first; eigenvalues that rounding made negative
    are 0."""
    w, Q = torch.linalg.eigh((S + S.mT) / 2)
    return Gram(w.clamp_min(0), Q)
