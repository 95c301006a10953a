"""Full fine-tuning kept as a change: W' - W hung on the restored base, so that it can be dialled, saved
and taken off."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.adapt.hooks import hang
from veneer.adapt.switch import train_only
from veneer.methods import Delta, build
from veneer.methods.full import Full
from veneer.sites import LeafSite, Site


def leaves(model: nn.Module) -> list[LeafSite]:
    """The modules that hold parameters themselves that were trained, in the model's order; one that shares
    all of them included."""
    return [
        LeafSite(n, m)
        for n, m in model.named_modules()
        if any(p.requires_grad for p in m.parameters(recurse=False))
    ]


@torch.no_grad()
def as_change(model: nn.Module, original: Mapping[str, Tensor], name: str) -> None:
    """Puts the weights of `original` (a state dict) back into the trained model, and what training made of
    them on top.

    The model's outputs stay those of the trained one, up to rounding; without adapter `name` they are the
    original's bit for bit. Layers that share a weight share its change.
    """
    sites = leaves(model)
    trained = [site.weight().clone() for site in sites]
    model.load_state_dict(dict(original))
    found: list[tuple[Site, Delta]] = []
    shared: dict[tuple[int, ...], Full] = {}
    for site, W in zip(sites, trained, strict=True):
        delta = build(Full, site, {})
        assert isinstance(delta, Full)
        owned = tuple(id(site.module.get_parameter(n)) for n in site.parameters)
        if owned in shared:
            delta.D = shared[owned].D
        else:
            delta.D.copy_(W.to(delta.D.dtype) - site.weight())
        shared.setdefault(owned, delta)
        found.append((site, delta))
    hang(model, name, found)
    train_only(model, name)
