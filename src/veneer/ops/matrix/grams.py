"""Powers of stacked small symmetric matrices, the parts of every preconditioner of A and B."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gram(NamedTuple):
    """S = Q diag(w) Q' of a positive semidefinite S (.., r, r): w (.., r), Q (.., r, r)."""

    w: Tensor
    Q: Tensor

    @property
    def mean(self) -> Tensor:
        """Returns tr(S) / r (.., 1, 1)."""
        return self.w.mean(-1)[..., None, None]

    def power(self, exponent: float, damping: Tensor | float = 0.0) -> Tensor:
        """Returns (S + damping)^exponent (.., r, r) on the range of S, zero elsewhere.

        damping: a number, or (.., 1, 1).

        The range ends at 10 r eps times the largest eigenvalue: below, a Gram matrix holds rounding errors
        alone.
        """
        w, Q = self
        shift = damping[..., 0] if isinstance(damping, Tensor) else damping
        there = w > 10 * w.shape[-1] * torch.finfo(w.dtype).eps * w[..., -1:]  # eigenvalues rise
        scaled = torch.where(there, torch.where(there, w + shift, 1.0).pow(exponent), 0.0)
        return (Q * scaled[..., None, :]) @ Q.mT


def gram(S: Tensor) -> Gram:
    """Returns the spectrum of S (.., r, r), symmetrised; negative eigenvalues become 0."""
    w, Q = torch.linalg.eigh((S + S.mT) / 2)
    return Gram(w.clamp_min(0), Q)
