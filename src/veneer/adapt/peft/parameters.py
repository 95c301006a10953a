"""Writes and reads PEFT's `target_parameters`: LoRA of fused experts, all experts of a parameter in one pair.

A parameter (E, d1, d2) has A (E r, n) with row e r + k, and B (m, r E) with column k E + e. PEFT reads it as
(E, out, in) since 0.19.1 unless its module says `is_transposed`, and as (E, in, out) before. The parameters
of one module nest: the last one's pair is called `<module>.lora_A.weight`, that of each before it has one
more `base_layer` in its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.attached import Changes
from veneer.adapt.peft.settings import PREFIX
from veneer.adapt.peft.targets import Config, at
from veneer.adapt.store.problems import Problem
from veneer.errors import FormatError
from veneer.methods import PeftForm
from veneer.methods.lora import LoRA
from veneer.sites.bare.layouts import is_transposed, stacks
from veneer.sites.bare.site import ParameterSite
from veneer.sites.finding.kinds import layers_of
from veneer.sites.own import base_modules

A, B = "lora_A.weight", "lora_B.weight"
FLIPPED = (0, 19, 1)  # the PEFT that reads plain stacks as (E, out, in)


class Stack(NamedTuple):
    """All matrices of one parameter: their sites in order, and the name of their module."""

    module: str
    parameter: str
    sites: list[ParameterSite]

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.module}.{self.parameter}"

    @property
    def host(self) -> nn.Module:
        """The module of the parameter."""
        first, *_ = self.sites
        return first.host

    @property
    def transposed(self) -> bool:
        """True if the matrices are kept (in, out)."""
        first, *_ = self.sites
        return first.module.transposed

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return tuple(self.host.get_parameter(self.parameter).shape)


def stacks_of(model: nn.Module, sites: Iterable[ParameterSite]) -> list[Stack] | None:
    """Returns the stacks that these sites make up, or None if one lacks matrices or is a single matrix."""
    names = {id(m): n for n, m in base_modules(model).items()}
    found: dict[str, Stack] = {}
    for site in sites:
        module, parameter = names[id(site.host)], site.module.parameter
        found.setdefault(f"{module}.{parameter}", Stack(module, parameter, [])).sites.append(site)
    whole = []
    for stack in found.values():
        own = {s.module.index: s for s in stack.sites}
        every = range(stack.stored[0])
        if own.keys() != set(every):  # the index of a single matrix is None
            return None
        whole.append(stack._replace(sites=[own[i] for i in every]))
    return whole


def fused(model: nn.Module, changes: Changes) -> dict[str, PeftForm] | None:
    """Returns one form for each parameter by its name, with tensors of whole names, or None if PEFT cannot.

    changes: LoRA at sites of bare parameters.
    """
    by_name = {site.name: delta for site, delta in changes}
    found = stacks_of(model, [s for s, _ in changes if isinstance(s, ParameterSite)])
    if found is None or not all(isinstance(d, LoRA) for d in by_name.values()):
        return None
    forms: dict[str, PeftForm] = {}
    for stack in found:
        own: list[PeftForm] = [by_name[s.name].to_peft(s) for s in stack.sites]  # type: ignore[operator]
        first, *_ = own
        if "start_rank" in first.config or any(f.config != first.config for f in own):
            return None
        pairs = [(f.tensors[A], f.tensors[B]) for f in own]
        names = _ends(stack, [s.parameter for s in found if s.module == stack.module])
        tensors = joined(pairs, swap=stack.transposed != _reads_turned(stack))
        forms[stack.name] = PeftForm(first.config, dict(zip(names, tensors, strict=True)))
    return forms


def _reads_turned(stack: Stack) -> bool:
    """Returns True if PEFT 0.19.1 reads the parameter as (E, in, out)."""
    return bool(getattr(stack.host, "is_transposed", False))


def _ends(stack: Stack, adapted: Sequence[str]) -> tuple[str, str]:
    """Returns the names of A and B behind the model's prefix. adapted: the module's adapted parameters."""
    order = [n for n in stack.host._parameters if n in adapted]
    lead = f"{stack.module}." + "base_layer." * (len(order) - 1 - order.index(stack.parameter))
    return f"{lead}{A}", f"{lead}{B}"


def joined(pairs: Sequence[tuple[Tensor, Tensor]], *, swap: bool) -> tuple[Tensor, Tensor]:
    """Returns A (E r, in) and B (out, r E) of all experts. swap: of the transposed changes."""
    As, Bs = ([p[i].mT if swap else p[1 - i] for p in pairs] for i in (1, 0))
    return torch.cat(As), torch.stack(Bs, dim=2).flatten(1)  # (out, r, E)


def parted(A: Tensor, B: Tensor, experts: int, *, swap: bool) -> list[tuple[Tensor, Tensor]]:
    """Returns A (r, in) and B (out, r) of each expert, the inverse of `joined`."""
    As = A.unflatten(0, (experts, -1))
    Bs = B.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return [(b.mT, a.mT) if swap else (a, b) for a, b in zip(As, Bs, strict=True)]


def target_names(model: nn.Module, forms: Iterable[str]) -> list[str]:
    """Returns the shortest endings of parameter names that mean these parameters and no others."""
    wanted = set(forms)
    every = [f"{m}.{p}" for m, module in base_modules(model).items() for p in module._parameters]
    short = sorted({".".join(n.rsplit(".", 2)[1:]) for n in wanted})
    meant = {n for n in every if any(n == s or n.endswith(f".{s}") for s in short)}
    return short if meant == wanted else sorted(wanted)


class Found(NamedTuple):
    """The changes of an adapter that was read so far, the tensors they used, and all problems."""

    changes: Changes
    used: set[str]
    problems: list[Problem]


def read(model: nn.Module, config: Config, tensors: Mapping[str, Tensor], found: Found) -> None:
    """Adds LoRA at every matrix of the targeted parameters to what was found."""
    layers, modules = layers_of(model), base_modules(model)
    problems = [
        f"target_parameters names {t!r}, which no parameter of the model is called"
        for t in config["target_parameters"]
        if not any(_is(f"{n}.{p}", t) for n, m in modules.items() for p in m._parameters)
    ]
    for name, module in modules.items():
        targets = [p for p in module._parameters if _targeted(config, f"{name}.{p}")]
        for parameter in targets:
            lead = f"{PREFIX}{name}." + "base_layer." * (len(targets) - 1 - targets.index(parameter))
            found.used.update({f"{lead}{A}", f"{lead}{B}"} & tensors.keys())
            try:
                stack = _stack(name, module, parameter, layers)
                found.changes.extend(_changes(stack, config, *_pair(tensors, lead)))
            except FormatError as e:
                problems += str(e).splitlines()
    found.problems.extend(Problem("fit", text) for text in problems)


def _stack(name: str, module: nn.Module, parameter: str, layers: Mapping[str, nn.Module]) -> Stack:
    """Returns the parameter's matrices. Raises FormatError for anything but a stack of a known layout."""
    p = module.get_parameter(parameter)
    if parameter not in stacks(module) or is_transposed(module, parameter) is None:
        raise FormatError(
            f"target_parameters: {name}.{parameter} {tuple(p.shape)} must be fused experts of a known layout;"
            " merge the adapter in PEFT"
        )
    names = [f"{name}.{i}.{parameter}" for i in range(len(p))]
    return Stack(name, parameter, [ParameterSite(n, layers[n]) for n in names])


def _pair(tensors: Mapping[str, Tensor], lead: str) -> tuple[Tensor, Tensor]:
    missing = [f"{lead}{end}" for end in (A, B) if f"{lead}{end}" not in tensors]
    if missing:
        raise FormatError("\n".join(f"missing: {key.removeprefix(PREFIX)}" for key in missing))
    return tensors[f"{lead}{A}"], tensors[f"{lead}{B}"]


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _targeted(config: Config, name: str) -> bool:
    return any(_is(name, t) for t in config["target_parameters"])


def _changes(stack: Stack, config: Config, A: Tensor, B: Tensor) -> Changes:
    """Returns the stack's changes. Raises FormatError for tensors that do not fit the parameter."""
    settings, (experts, d1, d2) = at(config, stack.name), stack.stored
    r = settings["r"]
    fits = {
        turned: (tuple(A.shape), tuple(B.shape)) == ((experts * r, m), (n, experts * r))
        for turned, (n, m) in ((False, (d1, d2)), (True, (d2, d1)))
    }
    if not any(fits.values()):
        raise FormatError(
            f"wrong shape: {stack.name} {stack.stored} has {tuple(A.shape)} and {tuple(B.shape)}, rank"
            f" {r} asks for {(experts * r, d2)} and {(d1, experts * r)}"
        )
    turned = _written_turned(stack, config) if all(fits.values()) else fits[True]
    pairs = parted(A, B, experts, swap=turned != stack.transposed)
    return [
        (site, LoRA.from_peft(site, settings, {"lora_A.weight": a, "lora_B.weight": b}))
        for site, (a, b) in zip(stack.sites, pairs, strict=True)
    ]


def _written_turned(stack: Stack, config: Config) -> bool:
    """Returns True if the PEFT that wrote the file read the parameter as (E, in, out).

    Raises FormatError without a version, where both readings fit the shapes.
    """
    said = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(config.get("peft_version")))
    if said is None:
        raise FormatError(
            f"{stack.name} {stack.stored}: its matrices are square, and PEFT before 0.19.1 wrote A and B the"
            " other way round; put the version that trained it into adapter_config.json as peft_version"
        )
    version = tuple(int(n) for n in said.groups() if n)
    if version < (0, 19):
        return True
    return _reads_turned(stack) == (version >= FLIPPED)
