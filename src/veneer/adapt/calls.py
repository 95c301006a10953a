"""Checks in the first training step that adapted layers are called and trained parameters get gradients."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.acting.forward import Deltas
from veneer.adapt.attached import layers
from veneer.adapt.hooks import drop, remove
from veneer.errors import SiteError, first_few

NOTES, CHECKED = "_gradients_of_the_first_step", "_gradients_were_checked"  # of a model


def watch(model: nn.Module) -> None:
    """Makes the first training step check the calls of adapted layers, and the second the first's gradients.

    Calls before it, such as those of an evaluation, do not count.
    """
    if not any(h is _after_step for h in model._forward_hooks.values()):
        model.register_forward_hook(_after_step)
    model.__dict__.pop(CHECKED, None)


def unwatch(model: nn.Module) -> None:
    """Takes the checks off the model."""
    remove(model, _after_step)
    notes = model.__dict__.pop(NOTES, None)
    if notes is not None:
        notes.close()


def check_called(model: nn.Module, *, in_step: bool = False) -> None:
    """Checks the calls of adapted layers since they were attached. in_step: only calls in training count.

    Layers that were found by default and are not reached, or cannot be changed, are dropped with one warning.
    Raises SiteError naming all others. A layer whose siblings in other blocks were called may be reached
    later (an expert).
    """
    every = [d for d in layers(model) if d.active]
    silent = _unreached(every, in_step)
    optional = [d for d in silent if d.active.keys() <= d.by_default]
    if len(optional) == len(every):
        optional = []  # no layer at all: the model was not called, or differs from what attach saw
    strict = [d.site.name for d in silent if not any(d is o for o in optional)]
    odd = [d for d in silent if d.misfit and d.site.name in strict]
    if odd:
        raise SiteError("\n".join(f"layer {d.site.name!r} {d.misfit}" for d in odd[:5]))
    if strict:
        raise SiteError(
            f"{len(strict)} adapted layers were never called in the first training step: {first_few(strict)}."
            " Their owner may read the weight itself, or not use them for this input; leave them out with"
            " exclude="
        )
    if optional:
        warnings.warn(
            f"{len(optional)} of {len(every)} adapted layers are not reached by this input, or cannot be"
            f" changed, and stay frozen: {first_few([d.site.name for d in optional], 3)}",
            stacklevel=2,
        )
        for d in optional:
            drop(d.site.module, list(d.active))


def _unreached(every: list[Deltas], in_step: bool) -> list[Deltas]:
    """Returns the layers that were not called, or could not be changed, in any block."""
    heard = [d for d in every if (d.stepped if in_step else d.called) and not d.misfit]
    kinds = {_kind(d.site.name) for d in heard}  # a layer that was heard is of one of them itself
    return [d for d in every if _kind(d.site.name) not in kinds]


def check_gradients(model: nn.Module) -> None:
    """Raises SiteError naming trained parameters of acting, called adapters that got no gradient in a step.

    Looks at the first step after an adapter was attached; for training loops, after the backward pass.
    """
    if model.__dict__.get(CHECKED):
        return
    bare = [n for n, p in _trained(model, called=True) if p.grad is None]
    if bare:
        raise SiteError(_without_gradient(bare))
    model.__dict__[CHECKED] = True


def _without_gradient(names: list[str]) -> str:
    return (
        f"{len(names)} trained parameters got no gradient in the first training step: {first_few(names)}."
        " The loss does not depend on their layers, or their owner reads the weight itself; leave the layers"
        " out with exclude="
    )


def _trained(model: nn.Module, *, called: bool) -> list[tuple[str, nn.Parameter]]:
    """Returns the trained parameters of acting adapters by name. called: only at layers that were called."""
    return [
        (f"{d.site.name}.{name}.{n}", p)
        for d in layers(model)
        if d.called or not called
        for name in d.active
        for n, p in d[name].named_parameters()
        if p.requires_grad
    ]


def _kind(name: str) -> str:
    """Returns "model.layers.#.q_proj" for "model.layers.3.q_proj"."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


# Hooks are plain functions so that they survive deepcopy and pickle.
def _after_step(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling() or not model.training or not torch.is_grad_enabled():
        return
    notes = model.__dict__.get(NOTES)
    if notes is None and NOTES in model.__dict__:
        unwatch(model)  # a copy of a model whose first step was checked
    elif notes is None:
        compiled = any(m._compiled_call_impl is not None for m in model.modules())
        if not compiled:  # compiled layers do not tell that they were called
            check_called(model, in_step=True)
        model.__dict__[NOTES] = _Notes(_trained(model, called=not compiled))
    elif notes.got:
        unwatch(model)
        if notes.missing():
            raise SiteError(_without_gradient(notes.missing()))


class _Notes:
    """Notes which trained parameters get a gradient after the first training step."""

    def __init__(self, wanted: list[tuple[str, nn.Parameter]]) -> None:
        self.wanted = wanted
        self.got: set[int] = set()
        self.handles = [p.register_post_accumulate_grad_hook(self._note) for _, p in self.wanted]

    def _note(self, p: Tensor) -> None:
        self.got.add(id(p))

    def missing(self) -> list[str]:
        return [n for n, p in self.wanted if id(p) not in self.got]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __deepcopy__(self, memo: Any) -> _Notes | None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()
