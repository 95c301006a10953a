"""Turns adapters, attached ones or those of folders, into the forms that a bank serves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from veneer.adapt import attached
from veneer.adapt.acting.groups import by_token
from veneer.adapt.attached import Changes
from veneer.adapt.banks.rows import Form, form_of
from veneer.adapt.store import store
from veneer.adapt.store.loaded import Loaded
from veneer.adapt.store.manifest import method_of
from veneer.errors import ConfigError, first_few, suggest
from veneer.methods import Delta
from veneer.methods.base.factors import ROWWISE
from veneer.sites import Site

Source: TypeAlias = (
    "str | Path | Loaded"  # an attached adapter's name, a folder, or what veneer.read returned
)
Forms: TypeAlias = "dict[str, tuple[Site, Form]]"  # one adapter's, by layer


EXPERTS = ", and experts whose module gets a choice of them for each token"


class Entry(NamedTuple):
    """One adapter of a bank. loaded: where it came from a folder, so that its effect can be checked in its
    slot.
    """

    forms: Forms
    loaded: Loaded | None = None


def to_train(model: nn.Module, adapters: Mapping[str, Source]) -> dict[str, Changes]:
    """Returns the deltas of attached adapters that train side by side. Raises ConfigError listing all that
    cannot.
    """
    _refuse(
        f"{n!r} is not attached{_nearest(model, str(a))}"
        for n, a in adapters.items()
        if a not in attached.adapters(model)
    )
    found = {name: attached.changes(model, str(a)) for name, a in adapters.items()}
    check_trainable(found)
    return found


def check_trainable(found: Mapping[str, Changes]) -> None:
    """Raises ConfigError listing all adapters that cannot train side by side."""
    dropping = {name: max(delta.dropout for _, delta in changes) for name, changes in found.items()}
    problems = [problem for name, changes in found.items() for problem in _shapeless(name, changes)]
    problems += [
        f"{n!r} drops inputs (dropout={p:g}), which a bank cannot; attach it with dropout=0"
        for n, p in dropping.items()
        if p
    ]
    _refuse(problems)


@torch.no_grad()
def entries(model: nn.Module, adapters: Mapping[str, Source]) -> dict[str, Entry]:
    """Returns the adapters by name; the model is not touched.

    Raises ConfigError listing all that are missing or have no normal form, and FormatError as `store.read`
    does.
    """
    there = attached.adapters(model)
    _refuse(
        f"{name!r}: {str(a)!r} is neither an attached adapter nor a folder{_nearest(model, str(a))}"
        for name, a in adapters.items()
        if not isinstance(a, Loaded) and a not in there and not Path(a).is_dir()
    )
    found: dict[str, Entry] = {}
    problems: list[str] = []
    for name, adapter in adapters.items():
        loaded = None
        if not (isinstance(adapter, str) and adapter in there):
            loaded = adapter if isinstance(adapter, Loaded) else store.read(model, adapter)
        changes = loaded.changes if loaded else attached.changes(model, str(adapter))
        problems += _shapeless(name, changes)
        forms = {site.name: (site, form) for site, delta in changes if (form := _form(site, delta))}
        found[name] = Entry(forms, loaded)
    _refuse(problems)
    return found


def _form(site: Site, delta: Delta) -> Form | None:
    """Returns the form that the delta has in eval mode."""
    if not site.acts_by_hook and not by_token(site):
        return None
    training = delta.training
    try:
        form = form_of(site, delta.eval())
    finally:
        delta.train(training)
    plain = form is None or (form.products is None and form.factors.c is None)
    return form if plain or site.acts_by_hook else None  # experts see no other input, nor products apart


def _shapeless(name: str, changes: Changes) -> list[str]:
    """Returns the reasons why an adapter cannot share a batch with others, by method and kind of layer."""
    problems: dict[tuple[str, bool, str], list[str]] = {}
    for site, delta in changes:
        if _form(site, delta) is None:
            problems.setdefault((method_of(delta), _by_row(site), site.kind), []).append(site.name)
    return [
        (
            f"{name!r}: {method} has no normal form at {first_few(names)}; use it alone, or make it a LoRA "
            "with veneer.to_lora"
        )
        if rowwise
        else (
            f"{name!r} changes {first_few(names)} of kind {kind!r}; a bank serves linear layers"
            f"{EXPERTS if kind == 'parameter' else ''}: leave these out"
        )
        for (method, rowwise, kind), names in problems.items()
    ]


def _by_row(site: Site) -> bool:
    """Tells if a bank can serve this site at all, by a method with a normal form."""
    return site.kind in ROWWISE if site.acts_by_hook else by_token(site)


def _nearest(model: nn.Module, name: str) -> str:
    return suggest(name, attached.adapters(model))


def _refuse(problems: Iterable[str]) -> None:
    problems = list(problems)
    if problems:
        raise ConfigError("\n".join(problems))
