"""Reads the modules that PEFT keeps whole (modules_to_save) as changes of their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from veneer import methods
from veneer.adapt.attached import Changes
from veneer.adapt.peft.settings import PREFIX
from veneer.adapt.store.problems import Problem
from veneer.errors import first_few
from veneer.methods import Delta
from veneer.sites import LeafSite, Site
from veneer.sites.own import is_own


def whole_module(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], used: set[str], problems: list[Problem]
) -> Changes:
    """Returns a module of modules_to_save as deltas of its parameters; adds to `used` and `problems`."""
    module = model.get_submodule(name)
    state = {f"{name}.{k}": t for k, t in module.state_dict().items() if not is_own(k)}
    used |= {f"{PREFIX}{k}" for k in state}
    wrong = [*_misfits(state, tensors)]
    if wrong:
        problems += [Problem("fit", text) for text in wrong]
        return []
    changes: Changes = []
    for inner, m in module.named_modules(prefix=name):
        if not is_own(inner) and next(m.parameters(recurse=False), None) is not None:
            changes.append(_full(LeafSite(inner, m), tensors))
    parameters = {f"{name}.{k}" for k, _ in module.named_parameters(remove_duplicate=False)}
    fixed = [k for k, t in state.items() if k not in parameters and not equal(tensors[f"{PREFIX}{k}"], t)]
    if fixed:
        problems.append(
            Problem(
                "fit",
                f"{first_few(fixed)}: a buffer of a whole module was changed, which no change of weights "
                "expresses",
            )
        )
    return changes


def _misfits(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for k, t in state.items():
        found = tensors.get(f"{PREFIX}{k}")
        if found is None:
            yield f"missing: {k} {tuple(t.shape)}, of a module in modules_to_save"
        elif found.shape != t.shape:
            yield f"wrong shape: {k} is {tuple(found.shape)}, the model's is {tuple(t.shape)}"


@torch.no_grad()
def _full(site: LeafSite, tensors: Mapping[str, Tensor]) -> tuple[Site, Delta]:
    delta = methods.build(methods.get("full"), site, {})
    (D,) = delta.parameters()
    trained = torch.cat([tensors[f"{PREFIX}{site.name}.{n}"].reshape(-1, 1) for n in site.parameters])
    D.copy_(trained.to(D) - site.weight().to(D))
    return site, delta


def equal(a: Tensor, b: Tensor) -> bool:
    """Returns True if the tensors are equal in the narrower of their dtypes."""
    b = b.detach().to(a.device)
    return torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype))
