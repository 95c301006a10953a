"""Notes the state of the base when an adapter is attached, to tell which weights were trained beside it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from veneer.adapt.attached import base_parameters

NOTES = "_base_when_attached"  # of a model: adapter -> parameter -> version


def note_base(model: nn.Module, adapter: str) -> None:
    """Notes the versions of the base's parameters."""
    notes = model.__dict__.setdefault(NOTES, {})
    notes[adapter] = {n: _version(p) for n, p in base_parameters(model).items()}


def forget_base(model: nn.Module, adapters: Iterable[str]) -> None:
    """Drops the notes of adapters that were detached."""
    notes = model.__dict__.get(NOTES, {})
    for name in adapters:
        notes.pop(name, None)
    if not notes:
        model.__dict__.pop(NOTES, None)


def trained_beside(model: nn.Module, adapter: str) -> list[str]:
    """Returns the base's parameters that take gradients and were written to since the adapter was attached.

    A write through `.data` leaves no trace. Copies of a model begin anew.
    """
    then = model.__dict__.get(NOTES, {}).get(adapter, {})
    own = base_parameters(model).items()
    return [n for n, p in own if p.requires_grad and n in then and _version(p) > then[n]]


def _version(p: nn.Parameter) -> int:
    return -1 if p.is_inference() else p._version
