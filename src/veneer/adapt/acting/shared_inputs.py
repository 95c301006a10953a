"""Finds layers that read the same input by watching one step, and groups them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from posixpath import commonpath
from typing import Any

from torch import Tensor, nn

from veneer.adapt.acting.forward import Deltas, Group, forget
from veneer.adapt.attached import deltas_of, layers
from veneer.methods.base.factors import ROWWISE


class _Watch:
    """Records runs of consecutive calls of adapted layers with the same tensor, unwritten in between."""

    def __init__(self) -> None:
        self.runs: list[list[Deltas]] = []
        self.last: tuple[Tensor, int] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        deltas = deltas_of(module)
        assert deltas is not None
        x, *_ = args or (None,)
        if not isinstance(x, Tensor) or x.is_inference():
            self.last = None
            return
        if self.last is not None and self.last[0] is x and self.last[1] == x._version:
            self.runs[-1].append(deltas)
        else:
            self.runs.append([deltas])
        self.last = (x, x._version)


@contextmanager
def discover(model: nn.Module) -> Iterator[nn.Module]:
    """Watches one whole eager step (backward included) and groups layers that read the same input.

    Grouped layers share the first half of their product. Earlier groups are dropped. Does not work around a
    compiled model, whose layers are not called one by one.
    """
    ungroup(model)
    watch = _Watch()
    owners = [m for m in model.modules() if deltas_of(m)]
    handles = [m.register_forward_pre_hook(watch) for m in owners]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
    for members in _steady(watch.runs):
        _freeze(model, members)


def groups(model: nn.Module) -> list[list[str]]:
    """Returns the names of the layers in every group."""
    found = {id(d.group): d.group for d in layers(model) if d.group is not None and d.group.members}
    return [[m.site.name for m in g.members] for g in found.values()]


def ungroup(model: nn.Module) -> None:
    """Drops all groups: every layer computes its own product again."""
    for d in layers(model):
        d.group = None
    forget(model)


def _steady(runs: list[list[Deltas]]) -> list[tuple[Deltas, ...]]:
    """Returns runs of two or more rowwise layers that were always called together, in order, once a run."""
    seen: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
    by_key = {}
    for run in runs:
        key = tuple(id(d) for d in run)
        by_key[key] = tuple(run)
        for d in run:
            seen[id(d)].add(key)
    return [
        run
        for key, run in by_key.items()
        if len(run) > 1 and len(set(key)) == len(key) and all(seen[k] == {key} for k in key) and _alike(run)
    ]


def _alike(run: tuple[Deltas, ...]) -> bool:
    devices = {d.site.device for d in run}
    return len(devices) == 1 and all(d.site.kind in ROWWISE for d in run)


def _freeze(model: nn.Module, members: tuple[Deltas, ...]) -> None:
    group = Group(*members)
    for place, m in enumerate(members):
        m.group, m.place = group, place
    owner = _owner(n for n, module in model.named_modules() if deltas_of(module) in members)
    model.get_submodule(owner).register_forward_hook(group.clear)


def _owner(names: Iterable[str]) -> str:
    """Returns the name of the smallest module that holds all of these."""
    return commonpath([n.replace(".", "/") for n in names]).replace("/", ".")
