"""Contenders of a comparison: names for methods with their layers, starts and optimisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import Parameter
from typing import Any

from veneer import embedded, methods, optim, settings
from veneer.errors import ConfigError, option, suggest
from veneer.train import rates
from veneer.train.parts.change import FULL
from veneer.train.run import Run

# Settings by name, over those of the run. Every method of the registry is a name too.
NAMED: dict[str, Mapping[str, Any]] = {
    "full": {"method": FULL},
    "lora-mlp": {"method": "lora", "to": "mlp"},
    "lora-attention": {"method": "lora", "to": "attention"},
    "rslora": {"method": "lora", "options": {"stabilised": True}},
    "pissa": {"method": "lora", "options": {"init": "pissa"}},
    "olora": {"method": "lora", "options": {"init": "olora"}},
    "loraga": {"method": "lora", "options": {"init": "loraga"}},
    "loraplus": {"method": "lora", "optimiser": "loraplus"},
    "lorapro": {"method": "lora", "optimiser": "lorapro"},
}
DEFAULT = ("full", "lora", "lora-mlp", "dora", "pissa", "loraplus", "oft")


# Settings of a run that a contender may set, beside its method's options.
OF_RUN = ("weight_decay", "label_smoothing", "neftune", "attention_dropout", "ema", "batch", "schedule")


def known() -> list[str]:
    """Returns all names; METHOD/OPTIMISER and NAME:option=value name others."""
    return sorted({*NAMED, *methods.available()})


def runs(base: Run, labels: Sequence[str]) -> dict[str, Run]:
    """Returns the run of every contender: the base's settings with its own, its rate not yet chosen.

    Options of the base that a contender's method lacks are left out. Raises one ConfigError for all
    impossible ones.
    """
    found, problems = {}, []
    for label in dict.fromkeys(labels):
        try:
            found[label] = replace(base, **_settings(base, label))
        except ConfigError as e:
            problems += [f"{label}: {line}" for line in e.text.splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _settings(base: Run, label: str) -> dict[str, Any]:
    head, *given_in_label = label.split(":")
    name, _, optimiser = head.partition("/")
    if name not in known():
        raise ConfigError(f"unknown method{suggest(name, known())}")
    if optimiser and optimiser not in optim.available():
        raise ConfigError(f"unknown optimiser {optimiser!r}{suggest(optimiser, optim.available())}")
    own = dict(NAMED.get(name, {"method": name}))
    method = methods.get(own["method"])
    fits = methods.options_of(method)
    given = {k: v for k, v in base.options.items() if k in fits}
    patterns: dict[str, Any] = {
        p: {} for p, k in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")) if k not in fits
    }
    named = _named(given_in_label, fits)
    own |= {k: v for k, v in named.items() if k in OF_RUN}
    chosen = {k: v for k, v in named.items() if k not in OF_RUN}
    own["options"] = {**given, **own.get("options", {}), **chosen}
    if optimiser:
        own["optimiser"] = optimiser
    if own.get("optimiser", base.optimiser) != base.optimiser:
        own["optimiser_options"] = {}
    if own["method"] == FULL:
        own |= {"to": None, "exclude": (), "untie": False, "quantise": None, "cache_frozen": False}
        own |= {"optimiser": "adamw", "optimiser_options": {}} if "optimiser" not in own else {}
    return {**patterns, **own}


def _named(entries: Sequence[str], fits: Mapping[str, Parameter]) -> dict[str, Any]:
    """Returns the values of option=value, as their types ask. Raises ConfigError for an unknown option."""
    found: dict[str, Any] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals or (key not in fits and key not in OF_RUN):
            raise ConfigError(f"{entry!r} must be option=value{suggest(key, [*fits, *OF_RUN])}")
        read = settings.read_yaml(f"{key}: {value}", entry)
        found |= read
    return found


def centre(run: Run) -> float:
    """Returns the rate around which a contender is tried: its default, or LoRA's if none is known.

    Raises ConfigError where LoRA's is unknown too.
    """
    rated = optim.make(run.optimiser, **run.optimiser_options).rated_as
    builtin = run.model == embedded.PREFIX
    try:
        return rates.default(run.method, rated, builtin, str(run.options.get("init")))
    except ConfigError:
        try:
            return rates.default("lora", rated, builtin)
        except ConfigError as e:
            advice = f"leave the contender out, or give rates by {option('centre')}"
            raise ConfigError(f"{run.method}/{run.optimiser}: {e.text}; {advice}") from None
