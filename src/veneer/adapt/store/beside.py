"""Chooses the modules that an adapter's file replaces whole: trained ones, and heads of classifiers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from veneer.adapt.attached import Changes
from veneer.adapt.base_notes import trained_beside
from veneer.adapt.peft import prefixes, writing
from veneer.adapt.peft.origin import heads
from veneer.adapt.store.problems import Problem
from veneer.errors import first_few
from veneer.sites.own import DRAWN


def written_with(
    model: nn.Module, name: str, changes: Changes
) -> tuple[writing.Written | None, list[str], list[Problem]]:
    """Returns adapter `name` in PEFT's format, with the modules that the file replaces whole.

    None if PEFT cannot express the adapter. Replaced modules tell nothing of the base: weights trained beside
    the adapter, and weights that are drawn at random in every process because the base's files lack them.
    Problems name trained weights that cannot be saved.
    """
    if prefixes.is_prefix(changes):
        return prefixes.write(model, changes), [], _lost(_trained(model, name))
    alone, beside = writing.write(model, changes), _beside(model, name, changes)
    written = writing.write(model, changes, beside) if alone and beside else alone
    if written is None:
        return alone, _drawn(model, alone), _lost(_trained(model, name))
    lost = [module for module in _trained(model, name) if module not in beside]
    return written, sorted({*beside, *_drawn(model, written)}), _lost(lost)


def _beside(model: nn.Module, name: str, changes: Changes) -> list[str]:
    """Returns modules without changes that must be saved with the adapter.

    A classifier's head is random in every process unless it is saved.
    """
    adapted = [site.name for site, _ in changes]
    modules = dict.fromkeys([*_trained(model, name), *heads(model)])
    return [m for m in modules if not any(within(site, [m]) for site in adapted)]


def _trained(model: nn.Module, name: str) -> list[str]:
    return list(dict.fromkeys(p.rpartition(".")[0] for p in trained_beside(model, name)))


def _lost(modules: Sequence[str]) -> list[Problem]:
    text = (
        f"weights of the base were trained beside the adapter and would be lost: {first_few(modules)}; attach"
        " them with method 'full', or merge the adapter and save the model"
    )
    return [Problem("beside", text)] if modules else []


def _drawn(model: nn.Module, written: writing.Written | None) -> list[str]:
    """Returns the modules that the file replaces and that the base's own files lack."""
    saved = (written.config.get("modules_to_save") or []) if written else []
    lacking = model.__dict__.get(DRAWN, ())
    return [m for m in saved if any(within(name, [m]) for name in lacking)]


def within(name: str, modules: Iterable[str]) -> bool:
    """Returns True if the name is one of the modules, or of a part of one."""
    return f"{name}.".startswith(tuple(f"{m}." for m in modules))
