"""Writes adapters in PEFT's format, https://huggingface.co/docs/peft: settings, names, tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.attached import Changes
from veneer.adapt.peft.settings import HEADS, PREFIX, TASKS, TOP, Table, table
from veneer.adapt.peft.targets import PATTERNS, Config, at, ends, targeted, wrapped
from veneer.methods import Delta, PeftForm, PeftStored
from veneer.methods.full import Full
from veneer.sites import LeafSite
from veneer.sites.own import is_own, without_own


class Written(NamedTuple):
    """An adapter in PEFT's format: settings, tensors, and tensors of modules kept whole.

    own: by site, settings that PEFT lacks.
    """

    config: Config
    tensors: dict[str, Tensor]
    whole: dict[str, Tensor]
    own: dict[str, Config]


def write(model: nn.Module, changes: Changes) -> Written | None:
    """Returns the adapter as PEFT expresses it exactly on the untouched base, or None if it cannot.

    Changes of whole modules (method full) become modules_to_save, if there are others beside them.
    """
    whole: Changes = [(s, d) for s, d in changes if isinstance(d, Full)]
    forms = {
        s.name: d.to_peft(s) if isinstance(d, PeftStored) else None
        for s, d in changes
        if not isinstance(d, Full)
    }
    known = {n: f for n, f in forms.items() if f is not None}
    if not known or len(known) < len(forms) or len({f.config["peft_type"] for f in known.values()}) > 1:
        return None
    kind = next(type(d) for _, d in changes if not isinstance(d, Full))
    settings, saved = table(kind), _modules(model, [s.name for s, _ in whole])
    config = _settings(model, known, saved, settings)
    shared = _shared([f.shared for f in known.values()], _room(kind, changes, known))
    if config is None or shared is None:
        return None
    if "fan_in_fan_out" in settings.always:
        config["fan_in_fan_out"] = any(s.kind == "transposed" for s, _ in changes)
    tensors = {f"{PREFIX}{n}.{end}": t for n, f in known.items() for end, t in f.tensors.items()}
    own = {n: {k: v for k, v in f.config.items() if k not in settings.every} for n, f in known.items()}
    return Written(
        config, {**tensors, **{f"{TOP}{n}": t for n, t in shared.items()}}, _saved(model, saved, whole), own
    )


def _room(kind: type[Delta], changes: Changes, forms: dict[str, PeftForm]) -> dict[str, tuple[int, ...]]:
    """Returns the least shapes of shared tensors in PEFT."""
    sites = [site for site, _ in changes if site.name in forms]
    return kind.peft_room(sites, forms[sites[0].name].config) if issubclass(kind, PeftStored) else {}


def _shared(found: list[dict[str, Tensor]], room: dict[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """Returns every shared tensor at the largest size in use, or None if the layers' tensors do not nest."""
    whole: dict[str, Tensor] = {}
    for name in found[0]:
        parts = [own[name] for own in found]
        shapes = [tuple(p.shape) for p in parts] + ([room[name]] if name in room else [])
        largest = parts[0].new_zeros([max(sizes) for sizes in zip(*shapes, strict=True)])
        for p in parts:
            largest[tuple(map(slice, p.shape))] = p
        if not all(torch.equal(largest[tuple(map(slice, p.shape))], p) for p in parts):
            return None
        whole[name] = largest
    return whole


def _settings(
    model: nn.Module, forms: dict[str, PeftForm], saved: list[str], settings: Table
) -> Config | None:
    """Returns adapter_config.json, or None if PEFT would apply it to other layers or with other ranks."""
    patterns = {k: p for k, p in PATTERNS.items() if k in settings.every and p in settings.every}
    per_site = {n: {k: v for k, v in f.config.items() if k in settings.every} for n, f in forms.items()}
    shared = [{k: v for k, v in own.items() if k not in patterns} for own in per_site.values()]
    if any(own != shared[0] for own in shared):
        return None
    config = {**settings.always, **shared[0], "modules_to_save": saved or None, **origin(model, saved)}
    for key, pattern in patterns.items():
        config[key], config[pattern] = _pattern({n: _whole(own[key]) for n, own in per_site.items()})
    names = list(without_own(n for n, _ in model.named_modules()))
    for targets in (_endings(forms, names), "|".join(re.escape(n) for n in forms)):
        config["target_modules"] = targets
        exact = [n for n in names if targeted(config, n)] == [n for n in names if n in forms]
        same = all(at(config, n)[key] == own[key] for n, own in per_site.items() for key in patterns)
        if exact and same and wrapped(config, names) == set(saved):
            return {k: v for k, v in config.items() if k in settings.always or v != settings.others.get(k)}
    return None


def origin(model: nn.Module, saved: list[str]) -> Config:
    """Returns the base's source and PEFT's task type.

    The task is None unless all heads that PEFT trains with it are saved.
    """
    kind, known = type(model), getattr(getattr(model, "config", None), "model_type", None)
    task = next((t for end, t in TASKS.items() if known and kind.__name__.endswith(end)), None)
    if getattr(kind, "main_input_name", "input_ids") != "input_ids":
        task = None  # PEFT's classes for tasks pass token ids by name, which Whisper's forward lacks
    heads = [n for n, _ in model.named_modules() if n.endswith(HEADS.get(task or "", ()))]
    if not set(heads) <= set(saved):
        task = None
    return {
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "task_type": task,
        "auto_mapping": None
        if task
        else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
    }


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _pattern(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """Returns the most common value, and the others by expressions that match only their layers."""
    common = Counter(values.values()).most_common(1)[0][0]
    others = {n: v for n, v in values.items() if v != common}
    if all(at({"r": common, "rank_pattern": others}, n)["r"] == v for n, v in values.items()):
        return common, others
    return common, {f"^{re.escape(n)}": v for n, v in others.items()}


def _endings(sites: Iterable[str], names: list[str]) -> list[str]:
    """Returns the shortest endings of names that match these layers and no others, or whole names."""
    sites = list(sites)
    short = sorted({n.rsplit(".", 1)[-1] for n in sites})
    return short if {n for n in names if ends(n, short)} == set(sites) else sorted(sites)


def _modules(model: nn.Module, sites: Sequence[str]) -> list[str]:
    """Returns the modules to save: a head as one module if all of its layers are among them."""
    heads = {end for known in HEADS.values() for end in known}
    found = set(outermost(sites))
    for name, module in model.named_modules():
        inner = [f"{name}.{n}" for n, m in module.named_modules() if n and _holds(m) and not is_own(n)]
        if name and name.rpartition(".")[2] in heads and inner and found >= {*inner}:
            found = {name, *(found - {*inner})}
    return sorted(found)


def _holds(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def outermost(names: Iterable[str]) -> list[str]:
    """Returns the names sorted, without modules inside others of them."""
    every = sorted(set(names))
    return [n for n in every if not any(n.startswith(f"{o}.") for o in every)]


def _saved(model: nn.Module, saved: list[str], whole: Changes) -> dict[str, Tensor]:
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
