"""PEFT's adapter folder as changes of our sites; whatever it holds that is not understood is a problem with a
text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer import methods
from veneer.adapt.attached import Changes
from veneer.adapt.peft import starts
from veneer.adapt.peft.settings import PREFIX, TOP, method_of, table
from veneer.adapt.peft.targets import Config, at, targeted, wrapped
from veneer.adapt.peft.writing import outermost
from veneer.adapt.problems import Problem
from veneer.errors import FormatError, SiteError, first_few
from veneer.methods import Delta, PeftStored
from veneer.sites import LeafSite, Site, find
from veneer.sites.find import kind_of
from veneer.sites.own import base_modules, is_own

# Settings that make the adapter more than a change of the targeted layers' weights.
BEYOND = {
    "bias": "the base's biases were trained too",
    "lora_bias": "the low-rank branch has a bias",
    "trainable_token_indices": "single rows of the embedding were trained",
    "target_parameters": "bare parameters, not layers, were adapted",
    "layer_replication": "the model's layers were repeated",
    "alora_invocation_tokens": "the adapter acts only behind certain tokens (aLoRA)",
    "arrow_config": "adapters are routed (Arrow)",
    "kasa_config": "the base's smallest singular values were cut off (KaSA)",
    "monteclora_config": "the factors are sampled (MonteCLoRA)",
    "velora_config": "activations were compressed (VeLoRA)",
    "use_bdlora": "the factors are block-diagonal",
    "use_qalora": "the input is pooled in groups (QALoRA)",
    "megatron_config": "the layers are Megatron's",
    "ensure_weight_tying": "tied layers share one pair of factors",
}
# Settings of other programs' file of the same name.
DIALECTS = {
    "fine_tune_type": "mlx-lm's",
    "lora_parameters": "mlx-lm's",
    "architecture": "the adapters library's",
    "config": "the adapters library's",
}


def settings_problems(config: Config, has_initial: bool) -> list[str]:
    """What in adapter_config.json cannot be expressed here, with the reason."""
    if "peft_type" not in config:
        other = next((d for k, d in DIALECTS.items() if k in config), "not PEFT's")
        return [
            f"this adapter_config.json is {other}: it has no peft_type; only PEFT's is read here: `veneer"
            f" convert` makes one of it"
        ]
    kind = method_of(config)
    if kind is None:
        return [
            f"peft_type {config['peft_type']!r} is not read here; convert it with PEFT's own save_as_lora,"
            f" or merge it there"
        ]
    known = table(kind).every
    beyond = {k: why for k, why in BEYOND.items() if config.get(k) and config[k] != known.get(k)}
    found = [
        f"{k}={config[k]!r}: {why}; this cannot be read: merge it in PEFT and keep the merged model"
        for k, why in beyond.items()
    ]
    unknown = [k for k in config if k not in known and k != "runtime_config" and config[k]]
    found += [
        f"{k}={config[k]!r}: a setting of PEFT that is not known here, and may change what the tensors mean"
        for k in unknown
    ]
    found += [
        f"{k}={config[k]!r} is no regular expression"
        for k in ("target_modules", "exclude_modules")
        if not _compiles(config.get(k))
    ]
    start = starts.problem(config.get("init_lora_weights", True), has_initial)
    return found + ([start] if start else [])


def _compiles(pattern: Any) -> bool:
    try:
        return not isinstance(pattern, str) or bool(re.compile(pattern))
    except re.error:
        return False


class Source(NamedTuple):
    """What is read: settings without settings_problems, the tensors, by site what our manifest adds to PEFT's
    settings, and the tensors of the folder saved before training."""

    config: Config
    tensors: Mapping[str, Tensor]
    own: Mapping[str, Config]
    initial: Mapping[str, Tensor] | None = None


def read(model: nn.Module, source: Source) -> tuple[Changes, list[Problem]]:
    """The changes of the model's sites, not attached, and all that is wrong with them."""
    names = list(base_modules(model))
    kind = method_of(source.config)
    assert kind is not None and issubclass(kind, PeftStored)
    config, tensors = {**table(kind).every, **source.config}, source.tensors
    if config["target_modules"] in (
        None,
        "all-linear",
    ):  # saved by hand: the tensors say which layers are meant
        config["target_modules"] = sorted(
            {k.removeprefix(PREFIX).partition(".lora_")[0] for k in tensors if ".lora_" in k}
        )
    idle = idle_targets(config, names)
    text = f"target_modules names {first_few(idle)}, which no layer of the model is called: nothing was trained there"
    problems = (
        [Problem("targets", text)] if 0 < len(idle) < len(config["target_modules"]) else []
    )  # all of them is said below
    sites = _sites(model, [n for n in names if targeted(config, n)], config, problems)
    changes, used = _adapted(kind, sites, source._replace(config=config), problems)
    for name in outermost(wrapped(config, names)):
        changes += _whole(model, name, tensors, used, problems)
    problems += _left_over(model, {k: t for k, t in tensors.items() if k not in used})
    return changes, problems


def idle_targets(config: Config, names: Sequence[str]) -> list[str]:
    """The entries of target_modules that no module is called: PEFT trains without them, and says nothing."""
    targets = config.get("target_modules")
    return (
        [e for e in targets if not any(n == e or n.endswith(f".{e}") for n in names)]
        if isinstance(targets, list)
        else []
    )


class Read(dict[str, Tensor]):
    """Tensors by name that record which of them were looked up."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.keys_read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.keys_read.add(name)
        return super().__getitem__(name)


def _adapted(
    kind: type[PeftStored], sites: list[Site], source: Source, problems: list[Problem]
) -> tuple[Changes, set[str]]:
    """The changes of the sites, and the names of the tensors that made them (or are to blame)."""
    shared = {
        k.removeprefix(TOP): t
        for k, t in source.tensors.items()
        if k.startswith(TOP) and not k.startswith(PREFIX)
    }
    changes: Changes = []
    used: set[str] = set()
    for site in sites:
        settings = {**at(source.config, site.name), **source.own.get(site.name, {})}
        try:
            start = None if source.initial is None else _of_site(source.initial, site)
            settings, found = starts.with_start(site, settings, _of_site(source.tensors, site), start)
            read = Read({**shared, **found})
            delta = kind.from_peft(site, settings, read)
        except FormatError as e:
            problems += [Problem("fit", line) for line in str(e).splitlines()]
            used |= {
                f"{PREFIX}{site.name}.{k}" for k in _of_site(source.tensors, site) if not _is_base(k)
            } | {f"{TOP}{k}" for k in shared}
            continue
        used |= {f"{PREFIX}{site.name}.{end}" for end in read.keys_read if end in found}
        used |= {f"{TOP}{end}" for end in read.keys_read if end in shared}
        changes.append((site, delta))
    return changes, used


def _is_base(name: str) -> bool:
    """Whether a site's tensor is a copy of the layer's own, and none of the adapter's."""
    return name.removeprefix("base_layer.") in ("weight", "bias")


def _of_site(tensors: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
    lead = f"{PREFIX}{site.name}."
    return {k.removeprefix(lead): t for k, t in tensors.items() if k.startswith(lead)}


def _sites(model: nn.Module, names: list[str], config: Config, problems: list[Problem]) -> list[Site]:
    """The targeted layers as sites. Tied layers are adapted one by one, as PEFT does."""
    if not names:
        some = first_few([n for n, m in model.named_modules() if kind_of(m)], 3)
        problems.append(
            Problem(
                "fit",
                f"no layer of the model matches target_modules={config['target_modules']!r}; it has e.g."
                f" {some}",
            )
        )
        return []
    other = [n for n in names if kind_of(model.get_submodule(n)) is None]
    problems += [
        Problem("fit", f"{n!r} is a {type(model.get_submodule(n)).__name__}, which cannot be adapted here")
        for n in other
    ]
    try:
        known = [re.escape(n) for n in names if n not in other]
        return find(model, "|".join(known), untie=True) if known else []
    except SiteError as e:
        problems += [Problem("fit", line) for line in str(e).splitlines()]
        return []


def _whole(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], used: set[str], problems: list[Problem]
) -> Changes:
    """A module that PEFT kept whole (modules_to_save), as changes of its parameters."""
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
    fixed = [k for k, t in state.items() if k not in parameters and not _equal(tensors[f"{PREFIX}{k}"], t)]
    if fixed:
        problems.append(
            Problem(
                "fit",
                f"{first_few(fixed)}: a buffer of a whole module was changed, which no change of weights"
                f" expresses",
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


def _left_over(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    """What nothing asked for. PEFT puts copies of the base's embeddings into the file: those that are the
    base's say nothing."""
    base = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not is_own(n)}
    unused = []
    for key, t in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        p = base.get(name)
        if p is None:
            unused.append(f"{key} {tuple(t.shape)}")
        elif p.shape != t.shape or not _equal(t, p):
            shapes = f" ({tuple(t.shape)} in the file, {tuple(p.shape)} here)" if p.shape != t.shape else ""
            why = "the vocabulary was resized, or the base is another; load the base it was trained on"
            yield Problem("fit", f"{name} in the file is another than the base's{shapes}: {why}")
    if unused:
        yield Problem("unused", f"{len(unused)} tensors belong to no layer: {first_few(unused)}")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal up to the narrower of the two dtypes."""
    b = b.detach().to(a.device)
    return torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype))
