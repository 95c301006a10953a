"""Singular values of an adapter's changes, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.attached import changes
from veneer.errors import NotMergeable
from veneer.methods import Delta
from veneer.ops.matrix.linalg import effective_rank, precise, product_spectrum
from veneer.sites import LeafSite, Site


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of the change of one matrix.

    rank: the largest that the method allows. norm: Frobenius norm. relative: norm over the norm of W, 0 if W
    is zero. effective_rank: exp of the entropy of the singular values. energy_rank: number of singular values
    that hold 90 % of the squared norm. values: the singular values, largest first.
    """

    site: str
    rank: int
    norm: float
    relative: float
    effective_rank: float
    energy_rank: int
    values: list[float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def spectra(model: nn.Module, name: str) -> list[Spectrum]:
    """Returns the spectrum of every matrix that adapter `name` changes, in the model's order."""
    return [_spectrum(*parts) for site, delta in changes(model, name) for parts in _matrices(site, delta)]


def _matrices(site: Site, delta: Delta) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Yields (name, W, singular values, rank) of each matrix of one change; skips vectors (norms, biases)."""
    if isinstance(site, LeafSite):
        own = site.split(site.weight())
        for n, D in site.split(delta.delta(site)).items():
            if D.ndim >= 2:
                yield (
                    f"{site.name}.{n}",
                    own[n].flatten(1),
                    torch.linalg.svdvals(precise(D).flatten(1)),
                    min(D.flatten(1).shape),
                )
        return
    if not site.is_matrix:
        return
    f = delta.factors(site)
    if f is not None and f.is_product:
        yield site.name, site.weight(), product_spectrum(f.B, f.A), f.A.shape[0]
        return
    with suppress(NotMergeable):  # nonlinear changes have no matrix
        D = precise(delta.delta(site))
        yield site.name, site.weight(), torch.linalg.svdvals(D), min(D.shape)


def _spectrum(site: str, W: Tensor, values: Tensor, rank: int) -> Spectrum:
    energy = values.square().cumsum(0)
    total = float(energy[-1])
    enough = int((energy < 0.9 * total).sum()) + 1 if total else 0
    norm = total**0.5
    base = float(precise(W).norm())
    return Spectrum(
        site, rank, norm, norm / base if base else 0.0, effective_rank(values), enough, values.tolist()
    )
