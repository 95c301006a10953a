"""Compares the changes of two adapters, layer by layer: their cosine and the spaces that they share.

The share of two spaces with orthonormal bases U (n, i) and V (n, j) is ||U' V||_F^2 / min(i, j).
Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 7.2.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.combine import of_matrices
from veneer.errors import ConfigError
from veneer.methods import Delta
from veneer.ops.matrix.linalg import precise
from veneer.sites import Site


@dataclass(frozen=True)
class Likeness:
    """One matrix that both adapters change.

    cosine: <D1, D2> / (||D1|| ||D2||), 0 where one is zero; outputs, inputs: shares of the left and right
    singular spaces.
    """

    site: str
    cosine: float
    outputs: float
    inputs: float

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return asdict(self)


class _Change(NamedTuple):
    """Thin SVD of one change: U (out, r), S (r,), V (in, r), without zero values."""

    U: Tensor
    S: Tensor
    V: Tensor


@torch.no_grad()
def likeness(model: nn.Module, first: str, second: str) -> list[Likeness]:
    """Compares two attached adapters on every matrix that both change, in the model's order.

    Raises ConfigError if they share no layer, NotMergeable if one changes something that is not a matrix.

        mean(layer.cosine for layer in likeness(model, "french", "german"))
    """
    one, other = dict(of_matrices(model, first)), dict(of_matrices(model, second))
    shared = [site for site in one if site in other]
    if not shared:
        raise ConfigError(
            f"{first!r} and {second!r} change no layer in common; compare adapters with the same targets"
        )
    return [_compare(site, _svd(site, one[site]), _svd(site, other[site])) for site in shared]


def _compare(site: Site, a: _Change, b: _Change) -> Likeness:
    left, right = a.U.mT @ b.U, a.V.mT @ b.V
    ranks = min(len(a.S), len(b.S))
    if not ranks:
        return Likeness(site.name, 0.0, 0.0, 0.0)
    product = (a.S[:, None] * left * right * b.S).sum()  # trace(V1 S1 U1' U2 S2 V2')
    cosine = float(product / (a.S.norm() * b.S.norm()))
    shares = [float(t.square().sum()) / ranks for t in (left, right)]
    return Likeness(site.name, cosine, *shares)


def _svd(site: Site, delta: Delta) -> _Change:
    f = delta.factors(site)
    if f is not None and f.is_product:
        QB, RB = torch.linalg.qr(precise(f.B).double())
        QA, RA = torch.linalg.qr(precise(f.A).double().mT)
        U, S, Vh = torch.linalg.svd(RB @ RA.mT)
        U, V = QB @ U, QA @ Vh.mT
    else:
        U, S, Vh = torch.linalg.svd(precise(delta.delta(site)).double(), full_matrices=False)
        V = Vh.mT
    kept = S > S.max() * 1e-7 if len(S) and S.max() > 0 else S > 0
    return _Change(U[:, kept], S[kept], V[:, kept])
