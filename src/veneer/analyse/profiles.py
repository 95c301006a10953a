"""Profiles of a change in the singular directions of the base: what is kept, what is moved, at which angle.

With W = U S V' and D = W' - W (PEFT-Arena 2026, https://arxiv.org/abs/2605.28819, spectral analysis):
retention |u_i' D v_i|, adaptation ||D v_i||, stable rank ||D||_F^2 / ||D||_2^2, and the cosine of v_i with
the i-th right singular vector of W'. Principal angles between the leading spaces of D and of W say how far
the change leaves the base's own directions. D is used through its factors where it has some; leading
directions come from subspace iterations, not from a full decomposition.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.attached import changes
from veneer.errors import ConfigError, NotMergeable
from veneer.methods import Delta
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import leading_svd, precise, product_norm
from veneer.sites import LeafSite, Site

ITERATIONS = 8  # of the subspace iteration, as for intruder dimensions
ROUNDING = 1e-7  # of the largest singular value: smaller ones of a change are rounding


class Matrix(NamedTuple):
    """One changed matrix: W (out, in) and D, as B (out, r) and A (r, in), or dense."""

    name: str
    W: Tensor
    B: Tensor | None = None
    A: Tensor | None = None
    dense: Tensor | None = None

    def times(self, V: Tensor) -> Tensor:
        """Returns D V (out, k) of V (in, k)."""
        if self.B is not None and self.A is not None:
            return self.B @ (self.A @ V)
        assert self.dense is not None
        return self.dense @ V

    def sum(self) -> Tensor:
        """Returns W + D (out, in)."""
        if self.B is not None and self.A is not None:
            return torch.addmm(self.W, self.B, self.A)
        assert self.dense is not None
        return self.W + self.dense

    def norm(self) -> float:
        """Returns the Frobenius norm of D."""
        if self.B is not None and self.A is not None:
            return float(product_norm(self.B.double(), self.A.double()))
        assert self.dense is not None
        return float(self.dense.double().norm())

    def leading(self, k: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the leading triplets U (out, n), S (n,), Vh (n, in) of D, n <= k without zero values."""
        if self.B is not None and self.A is not None:
            QB, RB = torch.linalg.qr(self.B.double())
            QA, RA = torch.linalg.qr(self.A.double().mT)
            U, S, Vh = torch.linalg.svd(RB @ RA.mT)
            U, Vh = QB @ U, Vh @ QA.mT
        else:
            assert self.dense is not None
            most = min(k, *self.dense.shape)
            U, S, Vh = (t.double() for t in leading_svd(self.dense, most, draw, ITERATIONS))
        n = min(k, int((S > ROUNDING * S[0]).sum())) if len(S) and S[0] > 0 else 0
        return U[:, :n], S[:n], Vh[:n]


@dataclass(frozen=True)
class Profile:
    """The profile of one changed matrix along the k leading directions of W, largest first.

    values: singular values of W; retention, adaptation, cosines: see the module; stable_rank: of D, 0 for no
    change; outputs, inputs: principal angles in degrees between the leading left and right spaces of D and W.
    """

    site: str
    values: list[float]
    retention: list[float]
    adaptation: list[float]
    cosines: list[float]
    stable_rank: float
    outputs: list[float]
    inputs: list[float]

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return asdict(self)


@torch.no_grad()
def profiles(model: nn.Module, name: str, *, k: int = 10, seed: int = 0) -> list[Profile]:
    """Returns the profile of every matrix that adapter `name` changes, in the model's order.

    k: leading directions, at most min(out, in) of each matrix. Raises ConfigError for k below 1.

        max(profiles(model, "french"), key=lambda p: p.stable_rank).site
    """
    if k < 1:
        raise ConfigError(f"k must be 1 or more, got {k}")
    return [_profile(matrix, k, seed) for matrix in matrices(model, name)]


def matrices(model: nn.Module, name: str) -> Iterator[Matrix]:
    """Yields every matrix that the adapter changes, kernels of convolutions flat.

    Skips vectors and changes that are not linear.
    """
    for site, delta in changes(model, name):
        with suppress(NotMergeable):
            yield from _matrices(site, delta)


def _matrices(site: Site, delta: Delta) -> Iterator[Matrix]:
    if isinstance(site, LeafSite):
        own = site.split(site.weight())
        for n, D in site.split(delta.delta(site)).items():
            if D.ndim >= 2:
                W, D = (precise(t.detach()).flatten(1) for t in (own[n], D))
                yield Matrix(f"{site.name}.{n}", W, dense=D)
    elif site.is_matrix:
        f, W = delta.factors(site), precise(site.weight().detach())
        if f is not None and f.is_product:
            yield Matrix(site.name, W, precise(f.B), precise(f.A))
        else:
            yield Matrix(site.name, W, dense=precise(delta.delta(site)))


def _profile(matrix: Matrix, k: int, seed: int) -> Profile:
    n = min(k, *matrix.W.shape)
    U, S, Vh = leading_svd(matrix.W, n, keyed(seed, f"{matrix.name} base"), ITERATIONS)
    _, _, tuned = leading_svd(matrix.sum(), n, keyed(seed, f"{matrix.name} tuned"), ITERATIONS)
    moved = matrix.times(Vh.mT)  # (out, n)
    left, values, right = matrix.leading(k, keyed(seed, f"{matrix.name} change"))
    return Profile(
        site=matrix.name,
        values=S.tolist(),
        retention=(U * moved).sum(0).abs().tolist(),
        adaptation=moved.norm(dim=0).tolist(),
        cosines=(Vh * tuned).sum(1).abs().clamp_max(1).tolist(),
        stable_rank=(matrix.norm() / float(values[0])) ** 2 if len(values) else 0.0,
        outputs=_angles(left, U),
        inputs=_angles(right.mT, Vh.mT),
    )


def _angles(P: Tensor, Q: Tensor) -> list[float]:
    """Returns the principal angles in degrees, smallest first, of the spaces of orthonormal columns P, Q."""
    if not P.shape[1] or not Q.shape[1]:
        return []
    cosines = torch.linalg.svdvals(P.double().mT @ Q.double()).clamp(0, 1)
    return torch.rad2deg(torch.acos(cosines)).tolist()
