"""The common middle form of all dialects: plain LoRA pairs by the Hugging Face name of their module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from veneer.errors import ConfigError, FormatError, first_few, suggest
from veneer.ops.matrix.linalg import precise
from veneer.ops.matrix.truncate import truncate_product

Kind = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True)
class Pair:
    """W' = W + scaling * B A; with a magnitude m (out,) DoRA's m * W' / ||W'||, norms of rows.

    A: (r, in), or (r, in, kernel..) for a convolution; B: (out, r) always. kind "embedding": in is the vocabulary.
    """

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    kind: Kind = "linear"

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def product(self) -> Tensor:
        """scaling * B A (out, in), the kernel flattened into in, in float32 at least."""
        return self.scaling * (precise(self.B) @ precise(self.A).flatten(1))


@dataclass(frozen=True)
class Pairs:
    """An adapter in no dialect.

    parts: the parts of a diffusers pipeline that begin the names of sites ("unet", "text_encoder"), none for a single
    model. origin: the base model's id or folder; task: PEFT's task_type; transposed: whether the base holds its layers
    as (in, out), like GPT-2. left_out: what the file held and these pairs do not, by permission.
    """

    sites: Mapping[str, Pair]
    parts: tuple[str, ...] = ()
    dropout: float = 0.0
    origin: str | None = None
    task: str | None = None
    transposed: bool = False
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [
            f"{n}: A {tuple(p.A.shape)}, B {tuple(p.B.shape)}" for n, p in self.sites.items() if not _fits(p)
        ]
        if wrong:
            raise FormatError(
                f"factors that do not fit together, A must be (r, in..) and B (out, r): {first_few(wrong)}"
            )
        lost = [n for n in self.sites if self.parts and not n.startswith(tuple(f"{p}." for p in self.parts))]
        if lost:
            raise FormatError(
                f"modules that belong to none of the parts {', '.join(self.parts)}: {first_few(lost)}"
            )
        if not self.sites:
            raise FormatError("there is no pair of factors A and B in this adapter")

    def each(self, change: Callable[[Pair], Pair]) -> Pairs:
        """The same adapter with every pair changed."""
        return replace(self, sites={n: change(p) for n, p in self.sites.items()})


def _fits(p: Pair) -> bool:
    shapes = p.A.ndim >= 2 and p.B.ndim == 2 and p.A.shape[0] == p.B.shape[1]
    return (
        shapes
        and (p.kind == "conv") == (p.A.ndim > 2)
        and (p.magnitude is None or p.magnitude.shape == p.B.shape[:1])
    )


class Changed(NamedTuple):
    """Pairs, and what was done to them in words."""

    pairs: Pairs
    notes: list[str]


def folded(pairs: Pairs) -> Changed:
    """The scaling multiplied into B. Exact for powers of two, rounded to B's dtype otherwise; how much is in the notes."""
    ready = pairs.each(lambda p: replace(p, B=(p.scaling * precise(p.B)).to(p.B.dtype), scaling=1.0))
    rounded = [n for n, p in pairs.sites.items() if math.frexp(p.scaling)[0] not in (0.5, -0.5, 0.0)]
    if not rounded:
        return Changed(ready, [])
    worst = max(
        _distance(p.scaling * p.B.double(), ready.sites[n].B.double()) for n, p in pairs.sites.items()
    )
    return Changed(
        ready,
        [
            f"the scaling was folded into B at {len(rounded)} layers; rounding moved no B by more than {worst:.1g} of itself"
        ],
    )


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp_min(torch.finfo(a.dtype).tiny))


def padded(pairs: Pairs, rank: int) -> Pairs:
    """All pairs with rows of zeros in A and columns of zeros in B up to `rank`: the same change."""

    def pad(p: Pair) -> Pair:
        more = rank - p.rank
        return replace(
            p,
            A=torch.cat([p.A, p.A.new_zeros(more, *p.A.shape[1:])]),
            B=torch.cat([p.B, p.B.new_zeros(p.B.shape[0], more)], 1),
        )

    return pairs.each(pad)


def uniform(pairs: Pairs) -> Changed:
    """One rank and one scaling for all, for dialects that have no others: padded with zeros, folded where scalings differ."""
    notes: list[str] = []
    scalings = [p.scaling for p in pairs.sites.values()]
    if max(scalings) - min(scalings) > 1e-12 * max(
        map(abs, scalings)
    ):  # alpha / r of the same scaling may differ in the last digit
        pairs, notes = folded(pairs)
    ranks = {p.rank for p in pairs.sites.values()}
    if len(ranks) > 1:
        notes = [*notes, f"ranks {', '.join(map(str, sorted(ranks)))} were padded with zeros to {max(ranks)}"]
    return Changed(padded(pairs, max(ranks)), notes)


def cut(pairs: Pairs, rank: int | None = None, energy: float | None = None) -> Changed:
    """The best pairs of a lower rank, or with a share `energy` of the squared norm; the error is in the notes.

    Raises FormatError for pairs with a magnitude, whose change has no low rank.
    """
    magnitudes = [n for n, p in pairs.sites.items() if p.magnitude is not None]
    if magnitudes:
        raise FormatError(
            f"DoRA's change has no low rank without the base's weights: {first_few(magnitudes)}"
        )
    found, worst = {}, 0.0
    for n, p in pairs.sites.items():
        best = truncate_product(p.scaling * precise(p.B), precise(p.A).flatten(1), rank, energy)
        A = best.A.reshape(-1, *p.A.shape[1:]).to(p.A.dtype)
        found[n], worst = replace(p, A=A, B=best.B.to(p.B.dtype), scaling=1.0), max(worst, best.error)
    most = max(p.rank for p in found.values())
    return Changed(
        replace(pairs, sites=found),
        [f"cut to ranks of at most {most}; of no layer's change more than {worst:.2%} was lost"],
    )


def to_dtype(pairs: Pairs, dtype: torch.dtype) -> Changed:
    """The factors in `dtype`. Magnitudes stay as they are: rounding one moves a whole row."""
    before = sorted(
        {str(p.A.dtype).removeprefix("torch.") for p in pairs.sites.values()}
        - {str(dtype).removeprefix("torch.")}
    )
    notes = (
        [f"factors were converted from {' and '.join(before)} to {str(dtype).removeprefix('torch.')}"]
        if before
        else []
    )
    return Changed(pairs.each(lambda p: replace(p, A=p.A.to(dtype), B=p.B.to(dtype))), notes)


def take_part(pairs: Pairs, part: str) -> Pairs:
    """The pairs of one part of a pipeline, under names without it; of an adapter without parts, those of the part `part`.

    Raises ConfigError for a part that the adapter does not have.
    """
    if not pairs.parts:
        return replace(pairs, sites={f"{part}.{n}": p for n, p in pairs.sites.items()}, parts=(part,))
    if part not in pairs.parts:
        raise ConfigError(f"the adapter has no part {part!r}{suggest(part, pairs.parts)}")
    lead = f"{part}."
    others = [n for n in pairs.sites if not n.startswith(lead)]
    kept = {n: p for n, p in pairs.sites.items() if n.startswith(lead)}
    return replace(pairs, sites=kept, parts=(part,), left_out=(*pairs.left_out, *others))


def bare(pairs: Pairs) -> Pairs:
    """The pairs under the names that the model itself has, for dialects of single models.

    Raises ConfigError for an adapter of several models.
    """
    if len(pairs.parts) > 1:
        raise ConfigError(
            f"the adapter changes {' and '.join(pairs.parts)}, and this dialect holds one model; choose one with part="
        )
    if not pairs.parts:
        return pairs
    return replace(
        pairs, sites={n.removeprefix(f"{pairs.parts[0]}."): p for n, p in pairs.sites.items()}, parts=()
    )


def only(pairs: Pairs, kinds: tuple[Kind, ...], dialect: str, magnitude: bool) -> None:
    """Raises FormatError, naming the layers, where a dialect cannot hold a kind of layer, or no magnitude."""
    other = [f"{n} ({p.kind})" for n, p in pairs.sites.items() if p.kind not in kinds]
    if other:
        raise FormatError(
            f"{dialect} holds changes of {' and '.join(kinds)} layers only, not {first_few(other)}"
        )
    if not magnitude and any(p.magnitude is not None for p in pairs.sites.values()):
        raise FormatError(
            f"{dialect} has no magnitudes (DoRA); the adapter must become plain LoRA, which needs the base model"
        )
