"""Changes and settings as sentences show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def moved(change: Mapping[str, float]) -> str:
    """Returns "1.513 → 1.405" for the change of a figure."""
    return f"{change['before']:.3f} → {change['after']:.3f}"


def percent(change: Mapping[str, float]) -> str:
    """Returns "-7.1 %", the change relative to the value before; the plain change from 0."""
    if not change["before"]:
        return f"{change['after']:+.3f}".replace("-", "\N{MINUS SIGN}")
    return f"{100 * (change['after'] / change['before'] - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def started(start: Mapping[str, Any]) -> str:
    """Returns a sentence about the share of the weights that an initialisation taken out of them leaves.

    start: as in results.json.
    """
    middle, least, most = (f"{100 * start['left'][k]:.3g}" for k in ("median", "least", "most"))
    over = f"{least} to {most} % over {len(start['layers'])} layers"
    return f"init {start['init']} leaves {middle} % of the norm of a weight in the median, {over}"


def plain(value: Any) -> str:
    """Returns a setting as a user would write it; a dash for an empty one."""
    if value is None or value == [] or value == {} or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
