"""Intruder dimensions: leading directions of W' that W lacks.

Shuttleworth et al. 2024, https://arxiv.org/abs/2410.21228. A left singular vector y_j of W' = W + D, j
<= k, is an intruder if max_i |cos(y_j, u_i)| < threshold over the left singular vectors u_i of W. Models
with fewer of them forget less at equal validation scores (section 4). Scaling an intruder by f adds (f -
1) sigma_j y_j v_j' to W' (section 5): one more rank each, stored exactly. PEFT's tool truncates to the
old rank instead, although an intruder need not lie in the span of D.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.combine import as_lora, of_matrices
from veneer.adapt.hooks import check_name, hang
from veneer.errors import ConfigError, NotMergeable
from veneer.methods import Delta
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import leading_svd, precise, symmetric, symmetric_product
from veneer.sites import Site

ITERATIONS = 8  # of the subspace iteration: the leading triplets of trained weights lie close together
ROUNDING = 1e-14  # a squared ratio of singular values


@dataclass(frozen=True)
class Intruders:
    """The leading left directions of one adapted matrix, largest value first.

    cosines: to the nearest direction of W; values: singular values; count: cosines below the threshold.
    """

    site: str
    cosines: list[float]
    values: list[float]
    count: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return asdict(self)


class _Leading(NamedTuple):
    """Leading triplets of W': U (out, k), S (k,), Vh (k, in); the largest cosine of each left vector (k,)."""

    site: Site
    delta: Delta
    U: Tensor
    S: Tensor
    Vh: Tensor
    cosines: Tensor


@torch.no_grad()
def intruders(
    model: nn.Module, name: str, *, k: int = 10, threshold: float = 0.5, seed: int = 0
) -> list[Intruders]:
    """Counts the intruder dimensions of every matrix that adapter `name` changes, in the model's order.

    k: leading directions to look at, at most min(out, in) of each matrix; threshold: in (0, 1].
    Raises ConfigError for numbers outside their range, NotMergeable for a change of something but matrices.

        found = intruders(model, "french")
        sum(layer.count for layer in found)
    """
    _check(k, threshold)
    found = _leading_of(model, name, k, seed)
    return [
        Intruders(f.site.name, f.cosines.tolist(), f.S.tolist(), int((f.cosines < threshold).sum()))
        for f in found
    ]


@torch.no_grad()
def n_intruders(W: Tensor, D: Tensor, *, k: int = 10, threshold: float = 0.5, seed: int = 0) -> int:
    """Returns the number of intruder dimensions of W + D (out, in) among its k leading left directions."""
    _check(k, threshold)
    W = precise(W)
    U, _, _ = leading_svd(W + precise(D), min(k, *W.shape), keyed(seed, "intruders"), ITERATIONS)
    return int((_nearest(W, U) < threshold).sum())


@torch.no_grad()
def scale_intruders(
    model: nn.Module,
    name: str,
    new: str,
    factor: float,
    *,
    k: int = 10,
    threshold: float = 0.5,
    seed: int = 0,
) -> int:
    """Attaches `new`: adapter `name` with its intruders times `factor`. Returns how many there are.

    factor: 0 removes intruders, 1 keeps them; the paper uses 0.3 to 0.9. The result is exact: a matrix with n
    intruders gets n more ranks. Raises ConfigError and NotMergeable before anything is attached.
    """
    _check(k, threshold)
    if not 0 <= factor <= 1:
        raise ConfigError(f"factor must be in [0, 1], got {factor:g}")
    check_name(model, new)
    made: list[tuple[Site, Delta]] = []
    n = 0
    for found in _leading_of(model, name, k, seed):
        inside = found.cosines < threshold
        n += int(inside.sum())
        A, B = _factors(found, inside, factor - 1)
        made.append((found.site, as_lora(found.site, A, B)))
    hang(model, new, made)
    return n


def _check(k: int, threshold: float) -> None:
    if k < 1:
        raise ConfigError(f"k must be 1 or more, got {k}")
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold must be in (0, 1], got {threshold:g}")


def _leading_of(model: nn.Module, name: str, k: int, seed: int) -> Iterator[_Leading]:
    for site, delta in of_matrices(model, name):
        W = precise(site.weight())
        tuned = W + precise(delta.delta(site))
        draw = keyed(seed, site.name)
        U, S, Vh = leading_svd(tuned, min(k, *W.shape), draw, ITERATIONS)
        yield _Leading(site, delta, U, S, Vh, _nearest(W, U))


def _nearest(W: Tensor, Y: Tensor) -> Tensor:
    """Returns the largest |cosine| of each column of Y (out, k) with a left singular vector of W: (k,).

    Decomposes the smaller Gram matrix in float64. Singular values below float32's rounding are left out.
    """
    W, Y = W.double(), Y.double()
    out, in_ = W.shape
    if out <= in_:
        values, U = symmetric(symmetric_product(W, W))
        U = U[:, values > values[-1] * ROUNDING]
    else:
        values, V = symmetric(symmetric_product(W.mT, W.mT))
        kept = values > values[-1] * ROUNDING
        U = W @ (V[:, kept] / values[kept].sqrt())
    return (U.mT @ Y).abs().amax(0) if U.shape[1] else torch.zeros(Y.shape[1], dtype=Y.dtype)


def _factors(found: _Leading, inside: Tensor, by: float) -> tuple[Tensor, Tensor]:
    """Returns A (r + n, in), B (out, r + n): the change plus by * sigma y v' of the chosen triplets."""
    f = found.delta.factors(found.site)
    if f is None or not f.is_product:
        raise NotMergeable(
            f"{found.site.name}: the change has no low-rank factors; make it one with `veneer combine --rank`"
        )
    B = torch.cat([precise(f.B), by * found.S[inside] * found.U[:, inside]], 1)
    return torch.cat([precise(f.A), found.Vh[inside]]), B
