"""Reads and writes the modules that PEFT keeps whole (modules_to_save): changes of their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from veneer import methods
from veneer.adapt.attached import Changes
from veneer.adapt.peft.settings import HEADS, PREFIX
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


def saved_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Returns the modules to save: a head as one module if all of its layers are among the names."""
    heads = {end for known in HEADS.values() for end in known}
    found = set(outermost(names))
    for name, module in model.named_modules():
        inner = [f"{name}.{n}" for n, m in module.named_modules() if n and _holds(m) and not is_own(n)]
        if name.rpartition(".")[2] in heads and inner and found >= {*inner}:
            found = {name, *(found - {*inner})}
    return sorted(found)


def _holds(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def outermost(names: Iterable[str]) -> list[str]:
    """Returns the names sorted, without modules inside others of them."""
    every = sorted(set(names))
    return [n for n in every if not any(n.startswith(f"{o}.") for o in every)]


def saved_tensors(model: nn.Module, saved: list[str], whole: Changes) -> dict[str, Tensor]:
    """Returns everything the modules hold, buffers too, with their changes applied."""
    own = {
        f"{n}.{k}": t for n in saved for k, t in model.get_submodule(n).state_dict().items() if not is_own(k)
    }
    for site, delta in whole:
        assert isinstance(site, LeafSite)
        parts = {n: site.module.get_parameter(n) for n in site.parameters}
        changed = (
            (site.weight() + delta.delta(site)).detach().flatten().split([p.numel() for p in parts.values()])
        )
        own.update(
            {f"{site.name}.{n}": t.view_as(p) for (n, p), t in zip(parts.items(), changed, strict=True)}
        )
    return {f"{PREFIX}{k}": t for k, t in own.items()}
