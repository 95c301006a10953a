"""Records the settings, texts and base of a run, and refuses to resume with others."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from veneer import methods, optim, settings
from veneer.errors import ConfigError, option
from veneer.files import read_json
from veneer.train.folder.layout import CONFIG
from veneer.train.folder.owner import FREE
from veneer.train.run import Run


def record(folder: Path) -> dict[str, Any]:
    """The run's config.json; settings that came to Veneer after it was written are at their defaults."""
    config = read_json(folder / CONFIG, ("run", "data", "base"))
    before = {"special_tokens": "spell", "eval_by": "windows"}  # the only ways before there were settings
    if "truncate" in config["run"].get("allow", ()):
        before["overlong"] = "cut"
    return {**config, "run": {**defaults(Run), **before, **config["run"]}}


def defaults(kind: type[settings.Settings]) -> dict[str, Any]:
    """Returns the defaults of all settings that have one."""
    return {n: s.default for n, s in settings.table(kind).items() if s.default is not settings.REQUIRED}


def check_drift(folder: Path, now: Mapping[str, Any], allow: Collection[str]) -> list[str]:
    """Returns the allowed differences between the run's config.json and `now`, for the record.

    Raises ConfigError with every difference that is not allowed: of settings (allow "config"), texts ("data")
    or base ("base").
    """
    then = record(folder)
    found = {
        "config": [
            d
            for d in differences(_spelled_out(then["run"]), _spelled_out(now["run"]))
            if d.split(":")[0] not in FREE
        ],
        "data": differences(then["data"], now["data"]),
        "base": differences(then["base"], now["base"]),
    }
    refused = [f"{kind}: {d}" for kind, lines in found.items() if kind not in allow for d in lines]
    if refused:
        kinds = [k for k, lines in found.items() if lines and k not in allow]
        raise ConfigError(
            f"{folder} was begun with other settings, texts or weights than it would go on with:\n"
            + "\n".join(f"  {line}" for line in refused)
            + f"\nput them back, begin anew in another folder, or pass {option('allow', tuple(kinds))}"
        )
    return [f"{kind}: {d}" for kind, lines in found.items() for d in lines]


def _spelled_out(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings with all options of its method and optimiser, those that were left out at their
    defaults."""
    method, optimiser = run["method"], run["optimiser"]
    known = {
        "options": methods.options_of(methods.get(method)) if method in methods.available() else {},
        "optimiser_options": optim.options_of(optimiser) if optimiser in optim.available() else {},
    }
    own = {key: {n: p.default for n, p in options.items()} | run[key] for key, options in known.items()}
    return {**run, **own}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "lr: 0.001 -> 0.002", or "options: rank: 4 -> 8, alpha: 4 -> 8", for every entry that differs; both
    as JSON has them."""
    old, new = (json.loads(json.dumps(d, default=list)) for d in (then, now))
    pairs = {k: (old.get(k), new.get(k)) for k in sorted({*old, *new}) if old.get(k) != new.get(k)}
    inside = {k: isinstance(a, dict) and isinstance(b, dict) for k, (a, b) in pairs.items()}
    return [
        f"{k}: {', '.join(differences(a, b)) if inside[k] else f'{a} -> {b}'}" for k, (a, b) in pairs.items()
    ]
