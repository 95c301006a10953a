"""Reads our own tensors file, for deltas that PEFT cannot express: states under `<layer>.<parameter>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer import methods
from veneer.adapt.attached import Changes
from veneer.adapt.banks.rows import Rows
from veneer.adapt.store.manifest import method_of, site_options
from veneer.adapt.store.problems import Problem
from veneer.errors import VeneerError, first_few
from veneer.methods import Delta
from veneer.methods.base.biased import Biased
from veneer.methods.base.protocols import Resizes
from veneer.methods.base.token_rows import TokenRows
from veneer.sites import Site, site_of_kind
from veneer.sites.finding.kinds import layers_of

TENSORS = "delta.safetensors"
ROWS = "token_rows"  # rows of tokens, which are trained beside a method
BIAS = "b"  # the tensor beside those of a method, of a change with a bias


def homeless(changes: Changes) -> list[Problem]:
    """Returns problems with deltas of methods outside `veneer.methods`, which could not be built again."""
    if any(isinstance(delta, Rows) for _, delta in changes):
        return [Problem("fit", "it is a bank of several adapters; save each of them under its own name")]
    known = {*methods.available(), ROWS}
    odd = sorted({method_of(delta) for _, delta in changes} - known)
    text = (
        f"{first_few(odd)}: PEFT cannot express this method, and Veneer finds methods by file when loading;"
        " put it into veneer.methods"
    )
    return [Problem("fit", text)] if odd else []


def rebuild(
    model: nn.Module, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Changes, list[Problem]]:
    """Returns the deltas that veneer.json describes, not attached, and all problems with them."""
    layers = {**layers_of(model), **dict(model.named_modules())}
    changes: Changes = []
    problems: list[Problem] = []
    used: set[str] = set()
    tied: dict[int, nn.Parameter] = {}  # rows of tokens by the weight that embedding and head share
    for name, entry in manifest["sites"].items():
        lead = f"{name}."
        own = {k.removeprefix(lead): t for k, t in tensors.items() if k.startswith(lead)}
        if name not in layers:
            problems.append(Problem("fit", f"the model has no layer {name!r}"))
            used |= {f"{lead}{k}" for k in own}
            continue
        try:
            site = site_of_kind(entry["kind"], name, layers[name])
            delta = _built(site, entry["method"], site_options(manifest, name))
        except VeneerError as e:
            problems.append(Problem("fit", str(e)))
            used |= {f"{lead}{k}" for k in own}
            continue
        if isinstance(delta, Resizes) and all(k in own for k, _ in delta.named_parameters()):
            delta.resize({k: own[k].shape for k, _ in delta.named_parameters()})
        if BIAS in own and BIAS not in delta.state_dict():
            delta = Biased(site, delta, site.weight().new_zeros(site.out))
        wanted = delta.state_dict()
        used |= {f"{lead}{k}" for k in wanted}
        wrong = _misfits(name, wanted, own)
        problems += [Problem("fit", text) for text in wrong]
        if not wrong:
            delta.load_state_dict({k: own[k] for k in wanted})
            if isinstance(delta, TokenRows):
                delta.D = tied.setdefault(id(site.module.weight), delta.D)
            changes.append((site, delta))
    unused = [f"{k} {tuple(t.shape)}" for k, t in tensors.items() if k not in used]
    if unused:
        problems.append(Problem("unused", f"{len(unused)} tensors belong to no layer: {first_few(unused)}"))
    return changes, problems


def _built(site: Site, method: str, options: dict[str, Any]) -> Delta:
    """Returns an empty change of this method."""
    if method == ROWS:
        width = site.out if site.kind == "embedding" else site.in_
        D = nn.Parameter(torch.zeros(len(options["tokens"]), width, device=site.device))
        return TokenRows(site, D, **options)
    kind = methods.get(method)
    # The true start is among the tensors.
    start = methods.unseen(site) if methods.takes_stats(kind) else None
    return methods.build(kind, site, options, start)


def _misfits(name: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    missing = [f"missing: {name}.{k} {tuple(t.shape)}" for k, t in wanted.items() if k not in found]
    return missing + [
        f"wrong shape: {name}.{k} is {tuple(found[k].shape)}, the model asks for {tuple(t.shape)}"
        for k, t in wanted.items()
        if k in found and found[k].shape != t.shape
    ]
