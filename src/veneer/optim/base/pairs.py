"""Finds the pairs A (r, in), B (out, r) among trained parameters, by role, and stacks them by shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, NotFinite, first_few
from veneer.ops.matrix.grams import Gram, gram
from veneer.ops.matrix.linalg import precise
from veneer.optim.base.groups import FACTORS, Part, decay_shares


class Pair(NamedTuple):
    """Factors of a change s B A with their module's scaling s; where: the name of the layer."""

    where: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    embedding: bool
    share: float = 0.5  # exponent of the weight decay of each factor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns (out, in, r)."""
        return self.B.shape[0], self.A.shape[1], self.A.shape[0]


def of(parts: Iterable[Part]) -> tuple[list[Pair], list[Part]]:
    """Returns the pairs and the other parameters.

    Raises ConfigError for a layer with other than one A and one B, and without any pair.
    """
    owned: dict[tuple[int, str], list[Part]] = defaultdict(list)
    others, shares, parts = [], {}, list(parts)
    for part, share in zip(parts, decay_shares(parts), strict=True):
        if part.role in FACTORS and part.owner is not None:
            owned[id(part.owner), part.pair].append(part)
            shares[id(part.owner), part.pair] = share
        else:
            others.append(part)
    odd = [found[0].name for found in owned.values() if not _is_pair(found)]
    if odd:
        raise ConfigError(
            f"this optimiser needs one A (r, in) and one B (out, r) per layer, which {first_few(odd)} lack;"
            " use optimiser 'adamw'"
        )
    if not owned:
        raise ConfigError(
            "this optimiser needs trained pairs A (r, in), B (out, r), got none; use optimiser 'adamw'"
        )
    return [_pair(found, shares[key]) for key, found in owned.items()], others


def _is_pair(found: list[Part]) -> bool:
    by_role = {p.role: p.parameter for p in found}
    if len(found) != 2 or set(by_role) != set(FACTORS):
        return False
    A, B = by_role["A"], by_role["B"]
    return A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]


def _pair(found: list[Part], share: float) -> Pair:
    by_role, first = {p.role: p.parameter for p in found}, found[0]
    assert first.owner is not None
    where, A, B = f"{first.name.rpartition('.')[0]}{first.pair}", by_role["A"], by_role["B"]
    return Pair(where, A, B, first.owner.scaling, first.embedding, share)


def by_shape(pairs: Iterable[Pair], *, mixed: bool = False) -> list[list[Pair]]:
    """Returns the pairs in buckets of one shape, dtype and rate; mixed: on a CPU, of one rank."""
    buckets: dict[Any, list[Pair]] = defaultdict(list)
    for p in pairs:
        shape = p.shape[2] if mixed and p.A.device.type == "cpu" else p.shape
        buckets[(shape, p.A.dtype, p.A.device, p.embedding, p.share)].append(p)
    return list(buckets.values())


@dataclass(frozen=True)
class Bucket:
    """The pairs of a shape, or of a rank, that have a gradient: every A (r, n) and B (m, r), float32 at
    least, and their gradients.

    A, B, gA, gB: stacks, of a shape alone. s: (L, 1, 1). states_a, states_b: what the optimiser remembers of
    each factor.
    kept: the share of it that decay leaves.
    """

    every_A: list[Tensor]
    every_B: list[Tensor]
    every_gA: list[Tensor]
    every_gB: list[Tensor]
    s: Tensor
    where: tuple[str, ...]
    states_a: list[dict[str, Tensor]]
    states_b: list[dict[str, Tensor]]
    rate: float
    kept: float

    @cached_property
    def A(self) -> Tensor:
        """Returns (L, r, n)."""
        return torch.stack(self.every_A)

    @cached_property
    def B(self) -> Tensor:
        """Returns (L, m, r)."""
        return torch.stack(self.every_B)

    @cached_property
    def gA(self) -> Tensor:
        """Returns (L, r, n)."""
        return torch.stack(self.every_gA)

    @cached_property
    def gB(self) -> Tensor:
        """Returns (L, m, r)."""
        return torch.stack(self.every_gB)

    @property
    def one_by_one(self) -> bool:
        """Returns True if products with factors run layer by layer: on a CPU, where stacking costs more."""
        return self.s.device.type == "cpu"

    def grams(self) -> tuple[Gram, Gram]:
        """Returns the spectra of A A' and B'B by one decomposition. Raises NotFinite."""
        w, Q = gram(self.products())
        return Gram(w[0], Q[0]), Gram(w[1], Q[1])

    def products(self) -> Tensor:
        """Returns A A' and B'B (2, L, r, r). Raises NotFinite with the layers that are not finite."""
        rows = [*self.every_A, *(B.t() for B in self.every_B)]
        S = (
            inner(rows, rows).unflatten(0, (2, -1))
            if self.one_by_one
            else torch.stack([self.A @ self.A.mT, self.B.mT @ self.B])
        )
        fine = S.isfinite().flatten(2).all(-1).all(0)
        if not fine.all():
            wrong = [name for name, ok in zip(self.where, fine.tolist(), strict=True) if not ok]
            raise NotFinite(
                f"A A' or B'B is not finite at {first_few(wrong)}; resume from a checkpoint with a lower lr"
            )
        return S


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Returns X Y' (L, r, r) of each X, Y (r, k), one by one."""
    return torch.stack([torch.mm(X, Y.t()) for X, Y in zip(left, right, strict=True)])


def stacked(tensors: list[Tensor]) -> Tensor:
    """Returns (L, ..) in at least float32."""
    return precise(torch.stack([t.detach() for t in tensors]))
