"""Adapters in normal form, from a model or from folders, for a bank."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from veneer.adapt import attach, attached
from veneer.adapt.attached import Changes
from veneer.adapt.banks.rows import Form, form_of
from veneer.adapt.store import store
from veneer.adapt.store.manifest import method_of
from veneer.errors import ConfigError, first_few, suggest
from veneer.methods import Delta
from veneer.methods.base.factors import ROWWISE
from veneer.sites import Site

Forms: TypeAlias = "dict[str, tuple[Site, Form]]"  # one adapter's, by layer


def to_train(model: nn.Module, adapters: Mapping[str, str | Path]) -> dict[str, Changes]:
    """The changes of attached adapters that are to be trained side by side. Raises ConfigError for all that cannot be."""
    _refuse(
        f"{n!r} is not attached{_nearest(model, str(a))}"
        for n, a in adapters.items()
        if a not in attached.adapters(model)
    )
    found = {name: attached.changes(model, str(a)) for name, a in adapters.items()}
    check_trainable(found)
    return found


def check_trainable(found: Mapping[str, Changes]) -> None:
    """Raises ConfigError for all adapters that cannot be trained side by side."""
    dropping = {name: max(delta.dropout for _, delta in changes) for name, changes in found.items()}
    problems = [problem for name, changes in found.items() for problem in _shapeless(name, changes)]
    problems += [
        f"{n!r} drops inputs (dropout={p:g}), which a bank does not; attach it without"
        for n, p in dropping.items()
        if p
    ]
    _refuse(problems)


@torch.no_grad()
def read(model: nn.Module, adapters: Mapping[str, str | Path]) -> dict[str, Forms]:
    """The normal forms of adapters, each by the name of an attached one or by a folder, which is loaded, and checked as
    load() does, and taken off again. Raises ConfigError for all that are not there or have none, and load()'s FormatError.
    """
    there = attached.adapters(model)
    _refuse(
        f"{name!r}: {str(a)!r} is neither an attached adapter nor a folder{_nearest(model, str(a))}"
        for name, a in adapters.items()
        if a not in there and not Path(a).is_dir()
    )
    found: dict[str, Forms] = {}
    problems: list[str] = []
    for name, adapter in adapters.items():
        changes = attached.changes(model, str(adapter)) if adapter in there else _loaded(model, adapter)
        problems += _shapeless(name, changes)
        found[name] = {
            site.name: (site, form) for site, delta in changes if (form := _form(site, delta)) is not None
        }
    _refuse(problems)
    return found


def _loaded(model: nn.Module, folder: str | Path) -> Changes:
    name = f"bank-{uuid.uuid4().hex[:8]}"
    store.load(model, folder, name)
    try:
        return attached.changes(model, name)
    finally:
        attach.detach(model, name)


def _form(site: Site, delta: Delta) -> Form | None:
    """The form as it is outside of training."""
    training = delta.training
    try:
        return form_of(site, delta.eval())
    finally:
        delta.train(training)


def _shapeless(name: str, changes: Changes) -> list[str]:
    """What of an adapter cannot share a batch with others, by method and by kind of layer."""
    problems: dict[tuple[str, bool, str], list[str]] = {}
    for site, delta in changes:
        if _form(site, delta) is None:
            method = method_of(delta)
            row = site.kind in ROWWISE
            problems.setdefault((method, row, site.kind), []).append(site.name)
    return [
        f"{name!r}: {method} has no normal form at {first_few(names)}; use it alone, or make it a LoRA with veneer.to_lora"
        if row
        else f"{name!r} changes {first_few(names)} of kind {kind!r}, and a bank serves linear layers; leave these out"
        for (method, row, kind), names in problems.items()
    ]


def _nearest(model: nn.Module, name: str) -> str:
    return suggest(name, attached.adapters(model))


def _refuse(problems: Iterable[str]) -> None:
    problems = list(problems)
    if problems:
        raise ConfigError("\n".join(problems))
