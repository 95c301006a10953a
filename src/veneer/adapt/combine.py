"""Adds adapters up: weighted sums, TIES, DARE, any method to LoRA, extraction from checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapt.attached import base_parameters, changes
from veneer.adapt.hooks import check_name, hang
from veneer.errors import ConfigError, FormatError, NotMergeable, ShapeError, first_few, option, suggest
from veneer.methods import Delta, get
from veneer.methods.base.protocols import Shifts
from veneer.methods.lora import LoRA
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import precise
from veneer.ops.matrix.truncate import Truncated, truncate, truncate_product
from veneer.ops.voting import dare, ties
from veneer.sites import LeafSite, Site, find
from veneer.sites.finding.names import Target

HOW = ("sum", "ties", "ties-scaled", "dare")


@dataclass(frozen=True)
class Cut:
    """One layer's rank after truncation, and the error relative to the norm of the exact change."""

    site: str
    rank: int
    error: float


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    how: str = "sum",
    density: float = 0.5,
    seed: int = 0,
) -> list[Cut]:
    """Attaches the weighted sum of adapters as a new LoRA adapter of the best low rank.

    weights: adapter name -> weight. rank, energy (share of the squared norm): where to truncate; without
    either the sum of low-rank changes is exact. how: "sum" (factors side by side, truncated by QR and a small
    SVD), "ties" (a weighted mean: only ratios of weights count), "ties-scaled" (weights scale it too, PEFT's
    form) or "dare"; density: the share of numbers that the last three keep of the dense changes. A change
    without low rank (DoRA) enters by the SVD of the dense sum and needs a rank or an energy. The new adapter
    acts; the base is not touched. Raises ConfigError and NotMergeable before anything is attached.
    """
    if how not in HOW:
        raise ConfigError(f"unknown way to combine {how!r}{suggest(how, HOW)}")
    if not weights:
        raise ConfigError("nothing to combine: give at least one adapter and its weight")
    if not 0 < density <= 1:
        raise ConfigError(f"density must be in (0, 1], got {density}")
    check_name(model, name)
    cuts = [
        (site, _join(site, own, (rank, energy), (how, density, seed)))
        for site, own in _by_site(model, weights).items()
    ]
    hang(model, name, [(site, as_lora(site, cut.A, cut.B)) for site, cut in cuts])
    return [Cut(site.name, cut.A.shape[0], cut.error) for site, cut in cuts]


def as_lora(site: Site, A: Tensor, B: Tensor) -> LoRA:
    """Returns a LoRA at scaling 1 with these factors."""
    return LoRA.holding(site, A, B, alpha=A.shape[0])


Own = list[tuple[str, Delta, float]]


def _by_site(model: nn.Module, weights: Mapping[str, float]) -> dict[Site, Own]:
    found: dict[Site, Own] = {}
    for name, weight in weights.items():
        for site, delta in of_matrices(model, name):
            found.setdefault(site, []).append((name, delta, float(weight)))
    return found


def of_matrices(model: nn.Module, name: str) -> list[tuple[Site, Delta]]:
    """Returns the adapter's deltas. Raises NotMergeable if a site is not a matrix."""
    own = changes(model, name)
    for site, delta in own:
        if isinstance(delta, Shifts):
            raise NotMergeable(
                f"{name!r} changes the bias of {site.name!r} too, which low-rank factors cannot hold; "
                "merge it"
            )
        if not site.is_matrix:
            raise NotMergeable(
                f"{name!r} changes {site.name!r} otherwise than by a matrix, which cannot be cut to a "
                "rank; combine low-rank adapters,"
                f" or merge it and extract a low-rank one from the merged model"
            )
    return own


def _join(
    site: Site, own: Own, cut: tuple[int | None, float | None], way: tuple[str, float, int]
) -> Truncated:
    how, density, seed = way
    factors = [delta.factors(site) for _, delta, _ in own]
    if how == "sum" and all(f is not None and f.is_product for f in factors):
        A = torch.cat([precise(f.A) for f in factors if f])
        B = torch.cat([w * precise(f.B) for f, (_, _, w) in zip(factors, own, strict=True) if f], 1)
        return truncate_product(B, A, *cut)
    if cut == (None, None):
        why = "its change has no low rank" if how == "sum" else f"{how} leaves no low rank"
        first = next(
            n
            for (n, _, _), f in zip(own, factors, strict=True)
            if how != "sum" or f is None or not f.is_product
        )
        raise NotMergeable(f"{first!r} at {site.name!r}: {why}; give rank= or energy=")
    dense = [precise(delta.delta(site)) for _, delta, _ in own]
    weights = [w for _, _, w in own]
    if how in ("ties", "ties-scaled"):
        return truncate(ties(dense, weights, density, scaled=how == "ties-scaled"), *cut)
    if how == "dare":
        dense = [
            dare(D, density, keyed(seed, f"{n}\0{site.name}"))
            for D, (n, _, _) in zip(dense, own, strict=True)
        ]
    return truncate(torch.stack([D.mul(w) for w, D in zip(weights, dense, strict=True)]).sum(0), *cut)


def to_lora(
    model: nn.Module, name: str, new: str, *, rank: int | None = None, energy: float | None = None
) -> list[Cut]:
    """Attaches adapter `name`, of any method, as the plain LoRA adapter `new`; see combine."""
    return combine(model, {name: 1.0}, new, rank=rank, energy=energy)


@torch.no_grad()
def extract(
    model: nn.Module,
    tuned: nn.Module,
    name: str,
    *,
    to: Target = "all-linear",
    rank: int | None = None,
    energy: float | None = None,
    rest: str = "refuse",
) -> list[Cut]:
    """Attaches the difference of `tuned`, a trained copy of `model`, as LoRA adapter `name`.

    to: the layers to truncate to a rank. rest: treatment of other differences (embeddings, norms, biases, the
    head): "refuse" raises FormatError naming them, "keep" keeps them whole beside the low-rank part, "drop"
    leaves them out. Raises ShapeError if the two models differ in kind, ConfigError without a rank or an
    energy; nothing is then attached.
    """
    if rest not in ("refuse", "keep", "drop"):
        raise ConfigError(f"unknown rest {rest!r}{suggest(rest, ('refuse', 'keep', 'drop'))}")
    if rank is None and energy is None:
        raise ConfigError("how far to cut? give rank= or energy= (0.9 keeps nine tenths of the squared norm)")
    check_name(model, name)
    sites = find(model, to)
    taken = {f"{site.name}.weight" for site in sites}
    before, after = base_parameters(model), base_parameters(tuned)
    odd = _other_shapes(before, after)
    _refuse_other_kind({n: why for n, why in odd.items() if rest != "drop" or n in taken})
    cuts = _low_rank(sites, tuned, rank, energy)
    others = [n for n, p in before.items() if n not in taken and n not in odd and _differ(p, after[n])]
    _refuse_rest(others, rest, nothing=not cuts and not others)
    if rest == "drop" and (others or odd):
        left = [*others, *odd]
        warnings.warn(f"extract leaves out {len(left)} other parameters: {first_few(left)}", stacklevel=3)
    kept = _in_full(model, tuned, others, {s.name for s, _ in cuts}) if rest == "keep" else []
    hang(model, name, [*((s, as_lora(s, c.A, c.B)) for s, c in cuts), *kept])
    return [Cut(s.name, c.A.shape[0], c.error) for s, c in cuts]


def _low_rank(
    sites: list[Site], tuned: nn.Module, rank: int | None, energy: float | None
) -> list[tuple[Site, Truncated]]:
    """Returns the truncated differences of the layers that differ."""
    there, cuts = dict(tuned.named_modules()), []
    for site in sites:
        D = precise(type(site)(site.name, there[site.name]).weight()) - precise(site.weight())
        if D.any():
            cuts.append((site, truncate(D, rank, energy)))
    return cuts


def _differ(p: Tensor, q: Tensor) -> bool:
    return not torch.equal(precise(p), precise(q))


def _other_shapes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the parameters that the two models do not share, by name, with the difference."""
    odd = dict.fromkeys(sorted(before.keys() ^ after.keys()), "missing in one of them")
    both = [n for n in before if n in after and before[n].shape != after[n].shape]
    return odd | {n: f"{tuple(before[n].shape)} and {tuple(after[n].shape)}" for n in both}


def _refuse_other_kind(odd: Mapping[str, str]) -> None:
    if odd:
        shown = first_few(sorted(f"{n}: {why}" for n, why in odd.items()))
        raise ShapeError(
            f"the two models differ in their parameters' shapes: {shown}; take the base with the same"
            f" vocabulary, or {option('rest', 'drop')}"
        )


def _refuse_rest(others: list[str], rest: str, *, nothing: bool) -> None:
    if others and rest == "refuse":
        raise FormatError(
            f"{len(others)} parameters outside the layers of to= differ too: {first_few(others)}; take "
            f"{option('rest', 'keep')} or {option('rest', 'drop')}"
        )
    if nothing:
        raise FormatError("the two models have the same weights; there is nothing to extract")


def _in_full(
    model: nn.Module, tuned: nn.Module, others: list[str], low_rank: set[str]
) -> list[tuple[Site, Delta]]:
    """Returns the modules that hold the other parameters, with their changes in full."""
    there = dict(tuned.named_modules())
    kept: list[tuple[Site, Delta]] = []
    for n in dict.fromkeys(p.rpartition(".")[0] for p in others):
        if n in low_rank:
            raise NotMergeable(
                f"{n!r} changed in its weight and in another parameter; a layer takes one kind of change "
                "in an adapter"
            )
        site, twin = LeafSite(n, dict(model.named_modules())[n]), LeafSite(n, there[n])
        delta = get("full")(site)
        delta.options = {}
        next(delta.parameters()).copy_(precise(twin.weight()) - precise(site.weight()))
        kept.append((site, delta))
    return kept
