"""The common form of all dialects: plain LoRA pairs by the Hugging Face name of their module."""

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

# The parts of models.diffusion.Diffusion, and how the layers of a transformer of diffusers begin: GPT-2's
# begin with "transformer." too.
TRAINED = ("unet", "transformer", "text_encoder", "text_encoder_2")
BLOCKS = ("transformer.transformer_blocks.", "transformer.single_transformer_blocks.")


@dataclass(frozen=True)
class Pair:
    """W' = W + scaling * B A; with a magnitude m (out,) DoRA's m * W' / ||W'||, with row norms.

    A: (r, in), or (r, in, kernel..) for a convolution. B: (out, r). kind "embedding": in is the vocabulary.
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
        """Returns scaling * B A (out, in) in at least float32, the kernel flattened into in."""
        return self.scaling * (precise(self.B) @ precise(self.A).flatten(1))


@dataclass(frozen=True)
class Pairs:
    """An adapter without a dialect.

    parts: parts of a diffusers pipeline that begin the names of sites ("unet", "text_encoder"); empty for a
    single model. origin: id or folder of the base model. task: PEFT's task_type. transposed: the base stores
    its layers as (in, out), like GPT-2. left_out: names in the file that these pairs dropped by permission.
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
                f"A must be (r, in, ..) and B (out, r), with sizes that fit, got {first_few(wrong)}"
            )
        lost = [n for n in self.sites if self.parts and not n.startswith(tuple(f"{p}." for p in self.parts))]
        if lost:
            raise FormatError(
                f"modules must belong to one of the parts {', '.join(self.parts)}, got {first_few(lost)}"
            )
        if not self.sites:
            raise FormatError("the adapter must hold at least one pair of factors A and B, got none")

    def each(self, change: Callable[[Pair], Pair]) -> Pairs:
        """Returns the adapter with `change` applied to every pair."""
        return replace(self, sites={n: change(p) for n, p in self.sites.items()})


def _fits(p: Pair) -> bool:
    shapes = p.A.ndim >= 2 and p.B.ndim == 2 and p.A.shape[0] == p.B.shape[1]
    return (
        shapes
        and (p.kind == "conv") == (p.A.ndim > 2)
        and (p.magnitude is None or p.magnitude.shape == p.B.shape[:1])
    )


class Changed(NamedTuple):
    """Pairs and sentences about the changes made to them."""

    pairs: Pairs
    notes: list[str]


def folded(pairs: Pairs) -> Changed:
    """Returns pairs with the scaling multiplied into B, scaling 1.

    Exact for powers of two. Otherwise B is rounded to its dtype, and a note gives the relative error.
    """
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
            f"the scaling was folded into B at {len(rounded)} layers; relative rounding error at most"
            f" {worst:.1g}"
        ],
    )


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp_min(torch.finfo(a.dtype).tiny))


def padded(pairs: Pairs, rank: int) -> Pairs:
    """Returns pairs of rank `rank`: A padded with rows of zeros, B with columns of zeros.

    The change is the same.
    """

    def pad(p: Pair) -> Pair:
        more = rank - p.rank
        return replace(
            p,
            A=torch.cat([p.A, p.A.new_zeros(more, *p.A.shape[1:])]),
            B=torch.cat([p.B, p.B.new_zeros(p.B.shape[0], more)], 1),
        )

    return pairs.each(pad)


def uniform(pairs: Pairs) -> Changed:
    """Returns pairs with one rank and one scaling, for dialects that store one of each.

    Lower ranks are padded with zeros. Scalings that differ are folded into B.
    """
    notes: list[str] = []
    scalings = [p.scaling for p in pairs.sites.values()]
    # alpha / r of the same scaling may differ in the last digit
    if max(scalings) - min(scalings) > 1e-12 * max(map(abs, scalings)):
        pairs, notes = folded(pairs)
    ranks = {p.rank for p in pairs.sites.values()}
    if len(ranks) > 1:
        notes = [*notes, f"ranks {', '.join(map(str, sorted(ranks)))} were padded with zeros to {max(ranks)}"]
    return Changed(padded(pairs, max(ranks)), notes)


def cut(pairs: Pairs, rank: int | None = None, energy: float | None = None) -> Changed:
    """Returns the best pairs of at most `rank`, or with the share `energy` of the squared norm.

    A note gives the relative error. Raises FormatError for pairs with a magnitude: their change is not
    low-rank.
    """
    magnitudes = [n for n, p in pairs.sites.items() if p.magnitude is not None]
    if magnitudes:
        raise FormatError(
            f"DoRA's change is not low-rank; truncating it needs the base model: {first_few(magnitudes)};"
            " give model="
        )
    found, worst = {}, 0.0
    for n, p in pairs.sites.items():
        best = truncate_product(p.scaling * precise(p.B), precise(p.A).flatten(1), rank, energy)
        A = best.A.reshape(-1, *p.A.shape[1:]).to(p.A.dtype)
        found[n], worst = replace(p, A=A, B=best.B.to(p.B.dtype), scaling=1.0), max(worst, best.error)
    most = max(p.rank for p in found.values())
    return Changed(
        replace(pairs, sites=found),
        [f"truncated to rank <= {most}; relative error of a layer's change at most {worst:.2%}"],
    )


def to_dtype(pairs: Pairs, dtype: torch.dtype) -> Changed:
    """Returns the factors in `dtype`. Magnitudes keep their dtype: rounding one moves a whole row."""
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
    """Returns the pairs of one part of a pipeline.

    For an adapter without parts, all pairs become pairs of `part`. Raises ConfigError for an unknown part.
    """
    if not pairs.parts:
        return replace(pairs, sites={f"{part}.{n}": p for n, p in pairs.sites.items()}, parts=(part,))
    if part not in pairs.parts:
        raise ConfigError(f"unknown part {part!r} of the adapter{suggest(part, pairs.parts)}")
    lead = f"{part}."
    others = [n for n in pairs.sites if not n.startswith(lead)]
    kept = {n: p for n, p in pairs.sites.items() if n.startswith(lead)}
    return replace(pairs, sites=kept, parts=(part,), left_out=(*pairs.left_out, *others))


def of_pipeline(pairs: Pairs) -> Pairs:
    """Returns pairs trained on a pipeline as one model with its parts; others unchanged."""
    firsts = {n.partition(".")[0] for n in pairs.sites}
    known = firsts <= set(TRAINED) and (
        firsts != {"transformer"} or any(n.startswith(BLOCKS) for n in pairs.sites)
    )
    return replace(pairs, parts=tuple(sorted(firsts))) if known and not pairs.parts else pairs


def bare(pairs: Pairs) -> Pairs:
    """Returns the pairs under the model's own names, for dialects of single models.

    Raises ConfigError for an adapter of several models.
    """
    if len(pairs.parts) > 1:
        raise ConfigError(
            f"the adapter changes {' and '.join(pairs.parts)}, but this dialect holds one model; choose one"
            " with part="
        )
    if not pairs.parts:
        return pairs
    return replace(
        pairs, sites={n.removeprefix(f"{pairs.parts[0]}."): p for n, p in pairs.sites.items()}, parts=()
    )


def only(pairs: Pairs, kinds: tuple[Kind, ...], dialect: str, magnitude: bool) -> None:
    """Raises FormatError with the layers whose kind or magnitude the dialect cannot hold."""
    other = [f"{n} ({p.kind})" for n, p in pairs.sites.items() if p.kind not in kinds]
    if other:
        raise FormatError(f"{dialect} supports {' and '.join(kinds)} layers only, got {first_few(other)}")
    if not magnitude and any(p.magnitude is not None for p in pairs.sites.values()):
        raise FormatError(
            f"{dialect} cannot hold DoRA's magnitudes; give model= and rank= to convert the adapter to plain"
            " LoRA"
        )
