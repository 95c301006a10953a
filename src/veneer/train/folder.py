"""A run's folder: what it was started with, its metrics line by line, and the refusal to go on with something else.

config.json  metrics.jsonl  results.json  lock  adapter/  checkpoints/step-N/
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer import methods, optim
from veneer.adapt.files import read_json, replacing, write_json
from veneer.errors import ConfigError, FormatError
from veneer.train import settings
from veneer.train.errors import NotSaved
from veneer.train.run import Run

CONFIG, METRICS, RESULTS, ADAPTER, CHECKPOINTS = "config.json", "metrics.jsonl", "results.json", "adapter", "checkpoints"
BASE = "base"  # quantised layers that no other run has
# Settings that change nothing in what is computed: they may differ when a run goes on.
FREE = ("out", "resume", "allow", "keep", "save_every", "report", "track")


def check_free(folder: Path, resume: bool) -> None:
    """Raises ConfigError if the folder holds a run, or anything else, and is not to be resumed."""
    there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    if there.exists() and not there.is_dir():
        raise ConfigError(f"out {folder}{'' if there == folder else f': {there}'} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"out {folder} cannot be written: {there} may not be written by this user; choose another folder")
    if (folder / CONFIG).exists() and not resume:
        state = "finished" if (folder / RESULTS).exists() else "unfinished"
        raise ConfigError(f"out {folder} holds another run ({state}); go on with it by resume=True (--resume), or choose another folder")
    if folder.is_dir() and not (folder / CONFIG).exists() and any(p.name != "lock" for p in folder.iterdir()):
        raise ConfigError(f"out {folder} is not empty and holds no run; choose another folder")


def put(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file, whole or not there."""
    with replacing(path) as (temporary,):
        write_json(temporary, content)


def record(folder: Path) -> dict[str, Any]:
    """The run's config.json; settings that came to Veneer after it was written are at their defaults."""
    config = read_json(folder / CONFIG)
    defaults = {name: s.default for name, s in settings.table(Run).items() if s.default is not settings.REQUIRED}
    return {**config, "run": {**defaults, **config["run"]}}


def check_drift(folder: Path, now: Mapping[str, Any], allow: Collection[str]) -> list[str]:
    """What differs between the run's config.json and `now` in allowed ways, for the record.

    Raises ConfigError with every difference that is not allowed: of settings (allow "config"), texts ("data") or base ("base").
    """
    then = record(folder)
    found = {
        "config": [d for d in differences(_spelled_out(then["run"]), _spelled_out(now["run"])) if d.split(":")[0] not in FREE],
        "data": differences(then["data"], now["data"]),
        "base": differences(then["base"], now["base"]),
    }
    refused = [f"{kind}: {d}" for kind, lines in found.items() if kind not in allow for d in lines]
    if refused:
        kinds = [k for k, lines in found.items() if lines and k not in allow]
        raise ConfigError(
            f"{folder} was begun with other settings, texts or weights than it would go on with:\n"
            + "\n".join(f"  {line}" for line in refused)
            + f"\nput them back, begin anew in another folder, or allow {', '.join(map(repr, kinds))}"
        )
    return [f"{kind}: {d}" for kind, lines in found.items() for d in lines]


def _spelled_out(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings with all options of its method and optimiser, those that were left out at their defaults."""
    method, optimiser = run["method"], run["optimiser"]
    known = {
        "options": methods.options_of(methods.get(method)) if method in methods.available() else {},
        "optimiser_options": optim.options_of(optimiser) if optimiser in optim.available() else {},
    }
    own = {key: {n: p.default for n, p in options.items()} | run[key] for key, options in known.items()}
    return {**run, **own}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "lr: 0.001 -> 0.002", or "options: rank: 4 -> 8, alpha: 4 -> 8", for every entry that differs; both as JSON has them."""
    old, new = (json.loads(json.dumps(d, default=list)) for d in (then, now))
    pairs = {k: (old.get(k), new.get(k)) for k in sorted({*old, *new}) if old.get(k) != new.get(k)}
    inside = {k: isinstance(a, dict) and isinstance(b, dict) for k, (a, b) in pairs.items()}
    return [f"{k}: {', '.join(differences(a, b)) if inside[k] else f'{a} -> {b}'}" for k, (a, b) in pairs.items()]


class Metrics:
    """metrics.jsonl: one JSON object a line, in the order of steps."""

    def __init__(self, folder: Path, n_bytes: int) -> None:
        """Goes on after the first n_bytes of the file; what came later is dropped. Raises FormatError if it is shorter."""
        self.path = folder / METRICS
        self.path.touch()
        there = self.path.stat().st_size
        if there < n_bytes:
            raise FormatError(f"{self.path} has {there} bytes, but {n_bytes} when the checkpoint was written; restore it, or begin anew")
        os.truncate(self.path, n_bytes)
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line, which other programs see at once. Raises NotSaved if there is no room for it."""
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            self.file.write(text)
            self.file.flush()
        except OSError as e:
            raise NotSaved(f"{len(text)} bytes could not be added to {self.path}: {e}; the checkpoints are untouched") from e

    def sync(self) -> int:
        """Has the file written to the disk: its length in bytes."""
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        """Ends the writing; what a full disk took no more is given up."""
        with suppress(OSError):
            self.file.close()
