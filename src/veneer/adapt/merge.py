"""Writes changes into the base and measures how much of them survives the base's number format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.attach import detach
from veneer.adapt.attached import active, adapters, changes, layers
from veneer.adapt.modes import evaluating
from veneer.adapt.probe_inputs import default_inputs
from veneer.adapt.switch import strengths, using
from veneer.adapt.untie import Ties, is_twin
from veneer.errors import ConfigError, NotMergeable, first_few, option
from veneer.methods import Delta
from veneer.methods.base.protocols import Dialled, Shifts
from veneer.ops.matrix.linalg import precise
from veneer.sites import Site

NO_ROUNDING = 0.01  # weights that hold the change so well cannot be why outputs miss it


@dataclass(frozen=True)
class Kept:
    """One layer's change: its norm, and the relative error of the written change."""

    site: str
    norm: float
    error: float


@dataclass(frozen=True)
class Verdict:
    """error: relative error of all changes together; 0 = exact, 1 = nothing written.

    logit_error: distance of the merged model's outputs on the probe from the adapted model's, relative to the
    adapter's effect there; None without a probe. Lost means that either exceeds `limit`.
    """

    sites: list[Kept]
    error: float
    logit_error: float | None
    limit: float

    @property
    def lost(self) -> bool:
        return not (self.error <= self.limit and (self.logit_error is None or self.logit_error <= self.limit))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "lost": self.lost}

    def __str__(self) -> str:
        worst = ", ".join(f"{k.site} {k.error:.1%}" for k in sorted(self.sites, key=lambda k: -k.error)[:3])
        gone = sum(k.error > self.limit for k in self.sites)
        shown = f"{gone} of {len(self.sites)} layers lost more than {self.limit:.0%}, worst {worst}"
        outputs = "" if self.logit_error is None else f"; {self.logit_error:.1%} of its effect on the outputs"
        if self.error < NO_ROUNDING and self.lost:
            return (
                f"LOST: the weights hold the change up to {self.error:.1%}, yet the outputs miss"
                f" {self.logit_error:.1%} of its effect; the model reads these weights elsewhere too"
            )
        return (
            f"{'LOST' if self.lost else 'kept'}: rounding took {self.error:.1%} of the change{outputs} "
            f"({shown})"
        )


def merge(
    model: nn.Module,
    *names: str | Mapping[str, float],
    probe: Mapping[str, Any] | None = None,
    limit: float = 0.5,
    force: bool = False,
) -> Verdict:
    """Adds the named adapters (or the acting ones, at their strengths) to the weights and detaches them.

    Sums are made in float32 and rounded once, to the layer's dtype or its quantised format, in which small
    changes vanish (veneer.dequantise makes layers plain). Raises NotMergeable, with the model unchanged, if
    rounding takes more than `limit` of the change or of its effect on the outputs, unless `force`. probe:
    keyword arguments of a call of the model, whose outputs are compared before and after; models of token ids
    have a default, an empty one compares nothing. Raises ConfigError if other adapters are attached, whose
    base this would change.
    """
    wanted = strengths(names) or active(model)
    _check(model, wanted)
    verdict = foresee(model, wanted, limit)
    if verdict.lost and not force:
        raise NotMergeable(refusal(verdict, packed=_is_packed(model)))
    inputs = default_inputs(model) if probe is None else probe
    if inputs:
        verdict = _write_compared(model, wanted, verdict, inputs, force=force)
    else:
        _write(model, wanted)
    detach(model)
    return verdict


def _write_compared(
    model: nn.Module, wanted: Mapping[str, float], verdict: Verdict, inputs: Mapping[str, Any], *, force: bool
) -> Verdict:
    """Writes the changes, returns the verdict with the outputs' error, and undoes a write that lost."""
    with using(model, wanted):
        adapted = outputs(model, inputs)
    with using(model):
        base = outputs(model, inputs)
        written = [] if force else [c.site for c in _layer_changes(model, wanted)]
        before = [(site, site.weight().detach().clone(), _bias_of(site)) for site in written]
        ties = _write(model, wanted)
        off = float(outputs(model, inputs).sub(adapted).norm())
    effect = float(adapted.sub(base).norm())
    verdict = replace(verdict, logit_error=off / effect if effect else 1.0)
    if verdict.lost and not force:
        for site, W, b in before:
            site.set_weight(W)
            if b is not None:
                site.module.bias.data.copy_(b)
        ties.restore()
        raise NotMergeable(refusal(verdict, packed=_is_packed(model)) if effect else _idle(wanted))
    return verdict


def _bias_of(site: Site) -> Tensor | None:
    bias = getattr(site.module, "bias", None) if site.is_matrix else None
    return None if bias is None else bias.detach().clone()


def _is_packed(model: nn.Module) -> bool:
    return any(d.site.is_packed for d in layers(model))


def refusal(verdict: Verdict, *, packed: bool) -> str:
    """Returns the error of a merge that was refused, with the ways out. packed: into a quantised format."""
    finer = "; bfloat16 is finer than the base's quantised format: merge into that (veneer.dequantise)"
    return (
        f"the adapter would be lost in the merge: {verdict}\n"
        f"keep it as an adapter, merge into a wider dtype (float32), or pass {option('force', True)}"
        f"{finer if packed else ''}"
    )


def _idle(wanted: Mapping[str, float]) -> str:
    return (
        f"{first_few(list(wanted))} does not change the outputs on the probe, which cannot show the loss in a"
        f" merge; train it first, give another probe=, or pass {option('force', True)}"
    )


def _check(model: nn.Module, wanted: Mapping[str, float]) -> None:
    if not wanted:
        raise ConfigError("nothing to merge: no adapter is attached and acting")
    bare = [
        site.name
        for name in wanted
        for site, delta in changes(model, name)
        if isinstance(delta, Shifts) and site.module.bias is None
    ]
    if bare:
        raise NotMergeable(
            f"{first_few(bare)} have no bias that the adapter's could be written to; keep it as an adapter"
        )
    others = [n for n in adapters(model) if n not in wanted]
    if others:
        raise ConfigError(
            f"merging would change the base under {first_few(others)}; detach them first, or merge them too"
        )


class _Change(NamedTuple):
    """The changes of one layer; twins: modules with the same parameters and the same change."""

    site: Site
    own: list[tuple[Delta, float]]
    twins: list[nn.Module]


def _layer_changes(model: nn.Module, wanted: Mapping[str, float]) -> list[_Change]:
    """Returns every changed layer once, with its deltas."""
    found: list[_Change] = []
    for d in layers(model):
        own = [(d[n], s) for n, s in wanted.items() if n in d]
        twin = next((c for c in found if is_twin(c.site, c.own, d.site, own)), None)
        if twin is not None:
            twin.twins.append(d.site.module)
        elif own:
            found.append(_Change(d.site, own, []))
    return found


def total_change(site: Site, own: list[tuple[Delta, float]]) -> Tensor:
    """Returns the sum (out, in) of one layer's changes at their strengths, in float32 or float64."""
    changes = (
        precise(d.delta_at(site, s)) if isinstance(d, Dialled) else s * precise(d.delta(site)) for d, s in own
    )
    return precise(sum(changes, torch.zeros((), device=site.device)))


@torch.no_grad()
def foresee(
    model: nn.Module, wanted: Mapping[str, float], limit: float = 0.5, *, dtype: torch.dtype | None = None
) -> Verdict:
    """Returns the verdict on a merge without writing. dtype: to merge into, each layer's own unless given."""
    kept, squared_error, squared_norm = [], 0.0, 0.0
    for site, own, _ in _layer_changes(model, wanted):
        change, W = total_change(site, own), site.weight()
        after = precise(W) + change
        stored = site.stored(after) if dtype is None else after.to(dtype)
        written = precise(stored) - precise(W if dtype is None else W.to(dtype))
        norm, error = float(change.norm()), float(written.sub(change).norm())
        kept.append(Kept(site.name, norm, error / norm if norm else 0.0))
        squared_error, squared_norm = squared_error + error**2, squared_norm + norm**2
    return Verdict(kept, math.sqrt(squared_error / squared_norm) if squared_norm else 0.0, None, limit)


@torch.no_grad()
def _write(model: nn.Module, wanted: Mapping[str, float]) -> Ties:
    """Writes all changes and returns the ties that were cut; a layer that shares its weight gets a copy."""
    ties = Ties()
    for site, own, twins in _layer_changes(model, wanted):
        ties.cut(model, [site.module, *twins])
        site.set_weight(precise(site.weight()) + total_change(site, own))
        for delta, strength in own:
            if isinstance(delta, Shifts):
                site.module.bias += (strength * delta.shift(site)).to(site.module.bias)
    return ties


@torch.no_grad()
def outputs(model: nn.Module, probe: Mapping[str, Any]) -> Tensor:
    """Returns the model's logits on the keyword arguments `probe`, in eval mode."""
    with evaluating(model):
        output = model(**probe)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return precise(logits)
