"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def moved(change: Mapping[str, float]) -> str:
    """ "1.513 → 1.405" of a change in bits per byte."""
    return f"{change['before']:.3f} → {change['after']:.3f}"


def percent(change: Mapping[str, float]) -> str:
    """ "-7.1 %", the change in parts of what it was before."""
    return f"{100 * (change['after'] / change['before'] - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def amount(n: float, unit: str = "B") -> str:
    """ "638 kB", "1.2 GB": decimal."""
    for size, word in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {word}{unit}"
    return f"{n:g} {unit}"


def seconds(n: float) -> str:
    """ "12.3 s", "4 min 5 s", "2 h 10 min"."""
    if n < 60:
        return f"{n:.3g} s"
    minutes, rest = divmod(round(n), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def started(start: Mapping[str, Any]) -> str:
    """What a start that is taken out of the weights leaves there, as results.json has it."""
    middle, least, most = (f"{100 * start['left'][k]:.3g}" for k in ("median", "least", "most"))
    over = f"{least} to {most} % over {len(start['layers'])} layers"
    return f"init {start['init']} leaves {middle} % of the norm of a weight in the median, {over}"


def plain(value: Any) -> str:
    """A setting as one would write it; a dash for nothing."""
    if value is None or value == [] or value == {} or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size(n: float) -> str:
    """ "1.2 GB": bytes for people, in thousands."""
    power = 0 if n < 1000 else min(len(UNITS) - 1, int(math.log10(n) // 3))
    return f"{n / 1000**power:.{0 if power == 0 else 1}f} {UNITS[power]}"


def rough_seconds(n: float) -> str:
    """ "3 min 20 s": seconds for people."""
    if n < 60:
        return f"{n:.2g} s" if n < 10 else f"{n:.0f} s"
    return f"{n // 60:.0f} min {n % 60:.0f} s" if n < 3600 else f"{n // 3600:.0f} h {n % 3600 // 60:.0f} min"
