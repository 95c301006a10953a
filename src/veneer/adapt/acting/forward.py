"""Adds acting deltas to a layer's output; layers that read the same x share the product x A'."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.acting.passes import Passes
from veneer.methods import Delta, Factors
from veneer.methods.base.protocols import AddsInPlace, Dialled, FollowsBase, GainsInput, Served, TurnsInput
from veneer.ops.lowrank import expand, project
from veneer.sites import Site
from veneer.sites.quantised_linear import QuantisedLinear


class Acting(NamedTuple):
    """The acting deltas of one layer:  y + excess * (y - bias) + B A x, and those without such a form.

    factors: A (r, in) and B (out, r) of all adapters stacked, gains and strengths folded into B; excess
    (out,): g - 1. Both may be None. x is the layer's input, c * x where an input gain acts alone.
    """

    factors: tuple[Tensor, Tensor] | None
    excess: Tensor | None
    others: tuple[tuple[Delta, float], ...]


class Part(NamedTuple):
    """One layer's part of its group's shared product: h = x A' (..., r)."""

    acting: Acting
    h: Tensor


class Held(NamedTuple):
    """A shared product on its way from the first layer of a group to the others, and its inputs."""

    x: Tensor
    switches: tuple[Any, ...]
    sources: tuple[nn.Parameter | Tensor, ...]
    versions: tuple[int, ...]
    parts: dict[int, Part]


class Group:
    """Layers that read the same x one after the other: the first one called computes x A' for all.

    A layer takes its part only if its input is that very tensor and no input of the product changed in
    between; else it computes its own. Copies of a group are empty: a copied layer computes its own product.
    """

    def __init__(self, *members: Deltas) -> None:
        self.members = members
        self.held: Held | None = None

    def __reduce__(self) -> tuple[type[Group], tuple[()]]:
        return Group, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return Group()

    def clear(self, *event: Any) -> None:
        """Drops the held product; a forward hook on the module that owns the members."""
        self.held = None

    def part(self, deltas: Deltas, x: Tensor, dtype: torch.dtype) -> Part | None:
        """Returns this layer's part for the input x in dtype, or None if it must compute its own."""
        index = deltas.place
        # Inference tensors have no versions.
        if not self.members or (not torch.compiler.is_compiling() and x.is_inference()):
            return None
        if index == 0:
            self.held = self._shared(x, dtype)
        if self.held is None or index not in self.held.parts or not self._fits(self.held, x, dtype):
            return None
        found = self.held.parts[index]
        rest = {i: p for i, p in self.held.parts.items() if i > index}
        self.held = self.held._replace(parts=rest) if rest else None
        return found

    def _shared(self, x: Tensor, dtype: torch.dtype) -> Held | None:
        every = [acting(m) for m in self.members]
        As = {i: a.factors[0] for i, a in enumerate(every) if a.factors is not None}
        if len(As) < 2:
            return None
        hs = project(x.to(dtype), [*As.values()])
        parts = {i: Part(every[i], h) for i, h in zip(As, hs, strict=True)}
        traced = torch.compiler.is_compiling()
        sources = () if traced else (x, *(p for m in self.members for p in m.parameters()))
        return Held(x, self._switches(dtype), sources, tuple(t._version for t in sources), parts)

    def _switches(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return dtype, torch.is_grad_enabled(), *(tuple(m.active.items()) for m in self.members)

    def _fits(self, held: Held, x: Tensor, dtype: torch.dtype) -> bool:
        """Returns True if a part may be taken.

        Versions are not compared under compilation: parameters do not change within a graph.
        """
        now = self._switches(dtype), tuple(t._version for t in held.sources)
        return held.x is x and (held.switches, held.versions) == now


def normal_form(delta: Delta, site: Site) -> Factors | None:
    """Returns the change as factors that can be summed with others, or None for a change without."""
    return delta.normal_form(site) if isinstance(delta, Served) else None


def _onto(delta: Delta, x: Tensor, y: Tensor, site: Site, *, writable: bool) -> Tensor:
    """Returns y plus the change, which acts alone in full."""
    if isinstance(delta, AddsInPlace):
        return delta.onto(x, y, site, writable=writable)
    change: Tensor = delta(x, y, site)
    return y + change


def acting(deltas: Deltas) -> Acting:
    """Returns the acting deltas of one layer, those in normal form summed into one."""
    As, Bs, gains, others = [], [], [], []
    for name, strength in deltas.active.items():
        form = normal_form(deltas[name], deltas.site)
        if form is None or (form.c is not None and not (deltas.site.acts_by_hook and _is_whole(deltas))):
            others.append((deltas[name], strength))
            continue
        if form.A.shape[0]:
            As.append(form.A)
            Bs.append(_times(form.B if form.g is None else form.g[:, None] * form.B, strength))
        if form.g is not None:
            gains.append(_times(form.g - 1, strength))
    factors = (_joined(As, 0), _joined(Bs, 1)) if As else None
    return Acting(factors, sum(gains[1:], gains[0]) if gains else None, tuple(others))


def changed_input(deltas: Deltas, x: Tensor) -> Tensor | None:
    """Returns the input in place of x if a single delta acts by it at strength 1, else None."""
    if not _is_whole(deltas):
        return None
    (name,) = deltas.active
    delta = deltas[name]
    if isinstance(delta, TurnsInput):
        return delta.turned(x, deltas.site)
    c = delta.input_gain(x, deltas.site) if isinstance(delta, GainsInput) else None
    return None if c is None else torch.addcmul(x, x, (c - 1).to(x.dtype))


def _is_whole(deltas: Deltas) -> bool:
    """Returns True if one delta acts at strength 1: only then is W' x that delta's own formula."""
    return list(deltas.active.values()) == [1.0]


def _joined(factors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(factors, dim) if len(factors) > 1 else factors[0]


def _at(delta: Delta, x: Tensor, y: Tensor, site: Site, strength: float) -> Tensor:
    """Returns the term to add to y at this strength."""
    if isinstance(delta, Dialled):
        return delta.forward_at(x, y, site, strength)
    change: Tensor = delta(x, y, site)
    return _times(change, strength)


def _times(change: Tensor, strength: float) -> Tensor:
    return change if strength == 1 else strength * change


def act(deltas: Deltas, x: Tensor, y: Tensor, *, writable: bool) -> Tensor:
    """Returns the layer's output y with all acting deltas. x: its input; writable: nobody else reads y."""
    part = deltas.group.part(deltas, x, y.dtype) if deltas.group is not None else None
    now = part.acting if part is not None else acting(deltas)
    if now.others and _is_whole(deltas):
        ((delta, _),) = now.others
        return _onto(delta, x, y, deltas.site, writable=writable)
    changes = [_at(delta, x, y, deltas.site, strength) for delta, strength in now.others]
    out = y
    if now.excess is not None:
        shift = deltas.site.shift()
        out = torch.addcmul(y, now.excess.to(y.dtype), y if shift is None else y - shift)
    if now.factors is not None:
        A, B = now.factors
        (h,) = (part.h,) if part is not None else project(x.to(y.dtype), [A])
        out = expand(out, h, B, writable=out is not y or (writable and not changes))
    for change in changes:
        out = out + change
    return out


def is_private(module: nn.Module, hook: Any) -> bool:
    """Returns True if no hook has seen the output of a plain or quantised Linear before `hook`."""
    plain = type(module) in (nn.Linear, QuantisedLinear) and "forward" not in module.__dict__
    bare = plain and not nn.modules.module._global_forward_hooks
    return bare and next(iter(module._forward_hooks.values())) is hook


def forget(model: nn.Module) -> None:
    """Removes the groups' hooks from the modules that own their members."""
    for module in model.modules():
        hooks = module._forward_hooks
        for key in [k for k, h in hooks.items() if isinstance(getattr(h, "__self__", None), Group)]:
            del hooks[key]


class Deltas(nn.Module):
    """The child of an adapted layer: its deltas by adapter name, and the strengths of those that act."""

    place: int  # in its group

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.active: dict[str, float] = {}
        self.called = False
        self.stepped = False  # called in training mode
        self.passes = Passes()
        self.by_default: set[str] = set()  # adapters that found this layer by default: it may be skipped
        self.misfit = ""  # why the layer's last call could not be changed
        self.group: Group | None = None  # of layers that read the same input, see shared_inputs.py
        self.swapped: dict[str, Tensor] = {}  # parameters of a whole module while it runs with others

    def _apply(self, fn: Any, recurse: bool = True) -> Deltas:
        """Moves the deltas with the model and keeps them in float32, which small steps need."""

        def kept(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            bare = t.is_meta or not t.is_floating_point()
            return moved if bare else t.to(moved.device, torch.promote_types(moved.dtype, torch.float32))

        super()._apply(kept, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """Loads the deltas; those that hold numbers computed from W follow the W that was just loaded."""
        super()._load_from_state_dict(*args, **options)
        for delta in self.children():
            if isinstance(delta, FollowsBase):
                delta.refresh(self.site)

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> Delta:
        delta = self._modules[name]
        assert isinstance(delta, Delta)
        return delta

    def names(self) -> list[str]:
        """Returns the adapters that change this layer, in the order in which they were attached."""
        return list(self._modules)
