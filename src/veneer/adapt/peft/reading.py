"""Reads PEFT's adapter folder as deltas of our sites; everything not understood becomes a problem."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from veneer import foreign
from veneer.adapt.attached import Changes
from veneer.adapt.peft import parameters, per_expert, starts
from veneer.adapt.peft.beside import Beside
from veneer.adapt.peft.settings import PREFIX, TOP, method_of, table
from veneer.adapt.peft.targets import Config, at, expressions, targeted, wrapped
from veneer.adapt.peft.whole import equal, outermost, whole_module
from veneer.adapt.store.problems import Problem
from veneer.errors import FormatError, SiteError, first_few
from veneer.methods import PeftStored
from veneer.sites import Site, find
from veneer.sites.finding.kinds import kind_of
from veneer.sites.own import base_modules, is_own


class Source(NamedTuple):
    """Readable settings and tensors; own: settings by site that our manifest adds to PEFT's.

    initial: the tensors of the folder saved before training.
    """

    config: Config
    tensors: Mapping[str, Tensor]
    own: Mapping[str, Config]
    initial: Mapping[str, Tensor] | None = None


def to_changes(model: nn.Module, source: Source) -> tuple[Changes, list[Problem]]:
    """Returns deltas for the model's sites, not attached, and all problems with them."""
    names = list(base_modules(model))
    kind = method_of(source.config)
    assert kind is not None and issubclass(kind, PeftStored)
    config, tensors = {**table(kind).every, **source.config}, source.tensors
    stacked = config.get("target_parameters")
    if config["target_modules"] in (None, "all-linear"):
        config["target_modules"] = [] if stacked else _meant(tensors)
    foreign.check_expressions(expressions(config), names, "adapter_config.json")
    experts = per_expert.read(model, config, tensors)
    idle = [e for e in idle_targets(config, names) if e.rpartition(".")[2] not in experts.parts]
    text = (
        f"target_modules names {first_few(idle)}, which no layer of the model is called: nothing was "
        "trained there"
    )
    problems = (
        [Problem("targets", text)] if 0 < len(idle) < len(config["target_modules"]) else []
    )  # all of them: reported below
    wanted = [n for n in names if targeted(config, n)]
    none = not wanted and (experts.changes or (stacked and not config["target_modules"]))
    sites, refused = ([], []) if none else _sites(model, wanted, config, problems)
    changes, used = _adapted(kind, sites, source._replace(config=config), problems)
    changes, used = changes + experts.changes, used | experts.used
    if stacked:
        parameters.read(model, config, tensors, parameters.Found(changes, used, problems))
    used |= {k for k in tensors if any(k.startswith(f"{PREFIX}{n}.") for n in refused)}
    for name in outermost(wrapped(config, names)):
        changes += whole_module(model, name, tensors, used, problems)
    beside = Beside(model, tensors, changes, used)
    beside.low_rank_biases(config)
    beside.biases(config)
    beside.rows(config)
    beside.embeddings()
    problems += beside.problems
    problems += left_over(model, {k: t for k, t in tensors.items() if k not in used})
    return changes, problems


def _meant(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the layers that the tensors of a file saved by hand name."""
    return sorted({k.removeprefix(PREFIX).partition(".lora_")[0] for k in tensors if ".lora_" in k})


def idle_targets(config: Config, names: Sequence[str]) -> list[str]:
    """Returns the entries of target_modules that match no module; PEFT ignores them silently."""
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
    """Returns the sites' deltas, and the names of the tensors that were used or caused a problem."""
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
    """Returns True if a site's tensor is a copy of the layer's own, not the adapter's."""
    return name.removeprefix("base_layer.") in ("weight", "bias")


def _of_site(tensors: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
    lead = f"{PREFIX}{site.name}."
    return {k.removeprefix(lead): t for k, t in tensors.items() if k.startswith(lead)}


def _sites(
    model: nn.Module, names: list[str], config: Config, problems: list[Problem]
) -> tuple[list[Site], list[str]]:
    """Returns the targeted layers as sites, and the names of those that cannot be adapted.

    Tied layers are adapted one by one, as PEFT does.
    """
    if not names:
        some = first_few([n for n, m in model.named_modules() if kind_of(m)], 3)
        problems.append(
            Problem(
                "fit",
                f"no layer of the model matches target_modules={config['target_modules']!r}; it has e.g. "
                f"{some}",
            )
        )
        return [], []
    if all(kind_of(model.get_submodule(n)) for n in names):
        try:
            return find(model, "|".join(map(re.escape, names)), untie=True), []
        except SiteError:  # of one or a few of them
            pass
    return _one_by_one(model, names, problems)


def _one_by_one(model: nn.Module, names: list[str], problems: list[Problem]) -> tuple[list[Site], list[str]]:
    """Returns the layers that can be adapted, and the names of the others, each with its problem."""
    sites, refused = [], []
    for name in names:
        module = model.get_submodule(name)
        if kind_of(module) is None:
            text = f"{name!r} is a {type(module).__name__}, which cannot be adapted here"
            problems.append(Problem("fit", text))
            refused.append(name)
            continue
        try:
            sites += [site for site in find(model, [name], untie=True) if site.name == name]
        except SiteError as e:
            problems += [Problem("fit", line) for line in str(e).splitlines()]
            refused.append(name)
    return sites, refused


def left_over(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Yields problems with tensors that no layer took.

    PEFT copies embeddings of the base into the file; only copies that differ from the base's are problems.
    """
    base = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not is_own(n)}
    unused = []
    for key, t in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        p = base.get(name)
        if p is None:
            unused.append(f"{key} {tuple(t.shape)}")
        elif not equal(t, p):
            shapes = f" ({tuple(t.shape)} in the file, {tuple(p.shape)} here)" if p.shape != t.shape else ""
            why = "the base is another, or its vocabulary was resized; load the base it was trained on"
            if p.shape != t.shape and p.shape[1:] == t.shape[1:]:
                why = f"resize the vocabulary first: model.resize_token_embeddings({len(t)})"
            yield Problem("fit", f"{name} in the file is another than the base's{shapes}: {why}")
    if unused:
        yield Problem("unused", f"{len(unused)} tensors belong to no layer: {first_few(unused)}")
