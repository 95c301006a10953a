"""Writes adapters in PEFT's format, https://huggingface.co/docs/peft: settings, names, tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.attached import Changes
from veneer.adapt.peft import parameters
from veneer.adapt.peft.beside import ROWS
from veneer.adapt.peft.origin import origin
from veneer.adapt.peft.settings import PREFIX, TOP, Table, table
from veneer.adapt.peft.targets import PATTERNS, Config, at, ends, targeted, wrapped
from veneer.adapt.peft.whole import saved_modules, saved_tensors
from veneer.adapt.tokens import alone
from veneer.methods import Delta, PeftForm, PeftStored
from veneer.methods.base.biased import Biased
from veneer.methods.base.factors import ROWWISE
from veneer.methods.base.token_rows import TokenRows
from veneer.methods.bitfit import BitFit
from veneer.methods.full import Full
from veneer.methods.lora import LoRA
from veneer.sites import Site
from veneer.sites.bare.site import ParameterSite
from veneer.sites.own import without_own

WRITES = "0.21.0"  # the version of PEFT whose layout of fused experts is written
BRANCH = "lora_B.bias"  # of the low-rank branch


class Written(NamedTuple):
    """An adapter in PEFT's format: settings, tensors, and tensors of modules kept whole.

    own: by site, settings that PEFT lacks.
    """

    config: Config
    tensors: dict[str, Tensor]
    whole: dict[str, Tensor]
    own: dict[str, Config]


def write(model: nn.Module, changes: Changes, beside: Iterable[str] = ()) -> Written | None:
    """Returns the adapter as PEFT expresses it exactly on the untouched base, or None if it cannot.

    Changes of whole modules (method full) become modules_to_save, if there are others beside them; `beside`
    names modules that are saved whole without a change.
    """
    whole: Changes = [(s, d) for s, d in changes if isinstance(d, Full)]
    biases: Changes = [(s, d) for s, d in changes if isinstance(d, BitFit)]
    rows = [(s, d) for s, d in changes if isinstance(d, TokenRows)]
    if len(rows) == len(changes):
        found = alone.write(model, rows)
        return Written(*found, {}, {}) if found and not beside else None
    others = [(s, d) for s, d in changes if not isinstance(d, Full | BitFit | TokenRows)]
    bare: Changes = [(s, d) for s, d in others if isinstance(s, ParameterSite)]
    others = [(s, d) for s, d in others if not isinstance(s, ParameterSite)]
    stacked = parameters.fused(model, bare)
    if stacked is None:
        return None
    forms = _with_biases({s.name: _form(s, d) for s, d in others}, {s.name: s.out for s, _ in others})
    known = {n: f for n, f in forms.items() if f is not None}
    every = {**known, **stacked}
    if not every or len(known) < len(forms) or len({f.config["peft_type"] for f in every.values()}) > 1:
        return None
    kind = type(_bare(next(d for _, d in [*others, *bare])))
    settings, saved = table(kind), saved_modules(model, [*(s.name for s, _ in whole), *beside])
    config = _settings(model, known, saved, settings, stacked)
    shared = _shared([f.shared for f in known.values()], _room(kind, others, known)) if known else {}
    if config is None or shared is None or ((biases or rows) and config["peft_type"] != "LORA"):
        return None
    if biases:
        config["bias"] = "all"
    if "fan_in_fan_out" in settings.always:
        config["fan_in_fan_out"] = any(s.kind == "transposed" for s, _ in changes)
    tensors = {f"{PREFIX}{n}.{end}": t for n, f in known.items() for end, t in f.tensors.items()}
    if rows:
        config["trainable_token_indices"], trained = _token_rows(rows)
        tensors |= trained
    tensors |= {f"{PREFIX}{n}": t for f in stacked.values() for n, t in f.tensors.items()}
    own = {n: {k: v for k, v in f.config.items() if k not in settings.every} for n, f in known.items()}
    tensors |= {f"{TOP}{n}": t for n, t in shared.items()}
    tensors |= {f"{PREFIX}{s.name}.bias": (s.weight() + d.delta(s)).detach().flatten() for s, d in biases}
    return Written(config, tensors, saved_tensors(model, saved, whole), own)


def _token_rows(found: list[tuple[Site, TokenRows]]) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Returns PEFT's indices by module and its tensors of whole rows; a tied head follows its embedding."""
    seen: set[int] = set()
    indices: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    for site, delta in found:
        if id(delta.D) not in seen:
            seen.add(id(delta.D))
            indices[site.name] = delta.tokens
            tensors[f"{PREFIX}{site.name}.{ROWS}"] = delta.rows(site)
    return indices, tensors


def _bare(delta: Delta) -> Delta:
    return delta.inner if isinstance(delta, Biased) else delta


def _form(site: Site, delta: Delta) -> PeftForm | None:
    """Returns the change as PEFT writes it, with the bias of its low-rank branch, or None if it cannot."""
    inner = _bare(delta)
    form = inner.to_peft(site) if isinstance(inner, PeftStored) else None
    if not isinstance(delta, Biased):
        return form
    if not isinstance(inner, LoRA) or site.kind not in ROWWISE:
        return None
    assert form is not None  # PEFT lacks LoRA only of some convolutions
    b = {BRANCH: (delta.b / inner.scaling).detach()}
    return PeftForm({**form.config, "lora_bias": True}, {**form.tensors, **b}, form.shared)


def _with_biases(forms: dict[str, PeftForm | None], sizes: dict[str, int]) -> dict[str, PeftForm | None]:
    """Gives all branches a bias if one has any: PEFT has one setting for all."""
    if not any(f is not None and BRANCH in f.tensors for f in forms.values()):
        return forms
    found: dict[str, PeftForm | None] = {}
    for n, f in forms.items():
        if f is not None and BRANCH not in f.tensors:
            zeros = {BRANCH: next(iter(f.tensors.values())).new_zeros(sizes[n])}
            f = PeftForm({**f.config, "lora_bias": True}, {**f.tensors, **zeros}, f.shared)
        found[n] = f
    return found


def _room(kind: type[Delta], changes: Changes, forms: dict[str, PeftForm]) -> dict[str, tuple[int, ...]]:
    """Returns the least shapes of shared tensors in PEFT."""
    config = next(iter(forms.values())).config
    return kind.peft_room([s for s, _ in changes], config) if issubclass(kind, PeftStored) else {}


def _shared(found: list[dict[str, Tensor]], room: dict[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """Returns every shared tensor at the largest size in use, or None if the layers' tensors do not nest."""
    whole: dict[str, Tensor] = {}
    names, *_ = found
    for name in names:
        parts = [own[name] for own in found]
        shapes = [tuple(p.shape) for p in parts] + ([room[name]] if name in room else [])
        first, *_ = parts
        largest = first.new_zeros([max(sizes) for sizes in zip(*shapes, strict=True)])
        for p in parts:
            largest[tuple(map(slice, p.shape))] = p
        if not all(torch.equal(largest[tuple(map(slice, p.shape))], p) for p in parts):
            return None
        whole[name] = largest
    return whole


def _settings(
    model: nn.Module,
    forms: dict[str, PeftForm],
    saved: list[str],
    settings: Table,
    stacked: dict[str, PeftForm],
) -> Config | None:
    """Returns adapter_config.json, or None if PEFT would apply it to other layers or with other ranks.

    stacked: forms of whole parameters, by their names.
    """
    every = {**forms, **stacked}
    first = next(iter(every.values())).config if every else {}
    patterns = {k: p for k, p in PATTERNS.items() if k in first and p in settings.every}
    per_site = {n: {k: v for k, v in f.config.items() if k in settings.every} for n, f in every.items()}
    shared = [{k: v for k, v in own.items() if k not in patterns} for own in per_site.values()]
    common, *_ = shared
    if any(own != common for own in shared) or (stacked and common["lora_dropout"]):
        return None
    config = {**settings.always, **common, "modules_to_save": saved or None, **origin(model, saved)}
    for key, pattern in patterns.items():
        config[key], config[pattern] = _pattern({n: _whole(own[key]) for n, own in per_site.items()})
    names = list(without_own(n for n, _ in model.named_modules()))
    if stacked:
        config["target_parameters"] = parameters.target_names(model, stacked)
        config["peft_version"] = WRITES  # its order of A and B
    for targets in (_endings(forms, names), "|".join(re.escape(n) for n in forms)) if forms else ([],):
        config["target_modules"] = targets
        exact = [n for n in names if targeted(config, n)] == [n for n in names if n in forms]
        same = all(at(config, n)[key] == own[key] for n, own in per_site.items() for key in patterns)
        if exact and same and wrapped(config, names) == set(saved):
            return {k: v for k, v in config.items() if k in settings.always or v != settings.others.get(k)}
    return None


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
