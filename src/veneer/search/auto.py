"""Settles `auto` for method and optimiser by a finished comparison on the same model and task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from veneer.errors import ConfigError, option
from veneer.files import read_json
from veneer.train.folder import layout
from veneer.train.run import Run

AUTO, FOLDER = "auto", Path("runs/compare")
SETTLED = ("method", "optimiser")


class Settled(NamedTuple):
    """Settings of a run without `auto`, and the reason in one sentence."""

    settings: dict[str, Any]
    reason: str


def asked(settings: Mapping[str, Any]) -> bool:
    """Tells if a setting is left to the measurements."""
    return any(settings.get(name) == AUTO for name in SETTLED)


def settled(settings: Mapping[str, Any], folder: Path = FOLDER) -> Settled:
    """Returns the settings with the contender that the comparison in `folder` supports.

    Settings that are given stay; the contender's rate, layers and options fill the rest. Raises ConfigError
    without a finished comparison of the same model and task.
    """
    if not (folder / layout.RESULTS).is_file():
        how = f"run veneer compare with the same {option('data')} first"
        raise ConfigError(f"{option('method', AUTO)} needs a finished comparison in {folder}; {how}")
    found = read_json(folder / layout.RESULTS, ("methods", "best", "model", "task"))
    other = [
        f"{name} {found[name]!r}, not {wanted!r}"
        for name, wanted in (
            ("model", settings.get("model", Run.model)),
            ("task", settings.get("task", Run.task)),
        )
        if found[name] != wanted
    ]
    if other:
        raise ConfigError(f"the comparison in {folder} is of {' and '.join(other)}; compare on this one")
    fixed = {name: settings[name] for name in SETTLED if settings.get(name, AUTO) != AUTO}
    row, why = supported(found, fixed)
    own = {k: v for k, v in row["settings"].items() if v is not None}
    given = {k: v for k, v in settings.items() if v != AUTO}
    merged = {**own, "lr": row["lr"], **given}
    merged["options"] = {**own.get("options", {}), **dict(given.get("options", {}))}
    return Settled(merged, f"{why} ({folder}, {found['seeds']} seeds)")


def supported(found: Mapping[str, Any], fixed: Mapping[str, str]) -> tuple[Mapping[str, Any], str]:
    """Returns the row of a comparison to use, and why: of those that tie with the best, the smallest.

    fixed: method or optimiser that the user gave. Raises ConfigError if no contender has it.
    """
    rows = {
        row["label"]: row
        for row in found["methods"]
        if row["score"] and all(row["settings"][name] == value for name, value in fixed.items())
    }
    if not rows:
        wanted = " and ".join(f"{name} {value!r}" for name, value in fixed.items()) or "a score"
        raise ConfigError(f"the comparison has no contender with {wanted}; add it to {option('methods')}")
    tied: Sequence[str] = [label for label in found["best"] if label in rows]
    if not tied:
        sign = 1 if found["metric"]["lower_is_better"] else -1
        tied = [min(rows, key=lambda label: sign * rows[label]["score"]["mean"])]
    chosen = min(tied, key=lambda label: rows[label]["trainable_parameters"])
    others = [label for label in tied if label != chosen]
    at = f"{chosen} at rate {rows[chosen]['lr']:.3g}"
    if others:
        return rows[chosen], f"{at}: it ties with {', '.join(others)} and trains the fewest parameters"
    return rows[chosen], f"{at}: it has the best score of the contenders compared"
