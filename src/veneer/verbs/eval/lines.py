"""Lines of a comparison: one figure of one text or benchmark, of the base and of every adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from veneer.ops import bootstrap
from veneer.tasks import Figure, Metric

BASE = "the base"  # as a title: names of adapters contain no space


class Against(NamedTuple):
    """A model with an adapter against its base on the same units.

    low, high: 95 % interval of the difference; None without a difference, with too few units, and for figures
    that are not means over units.
    """

    value: float
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Line:
    """One figure of one text or benchmark. units: resampled for the intervals; n: their number.

    adapters: by title.
    """

    name: str
    metric: str
    lower_is_better: bool
    units: str
    n: int
    base: float
    adapters: dict[str, Against]

    def as_dict(self) -> dict[str, Any]:
        """Returns the line, ready for JSON."""
        return {**asdict(self), "adapters": {title: a._asdict() for title, a in self.adapters.items()}}


@dataclass(frozen=True)
class Evaluation:
    """Lines, and notes on how to read them."""

    base: str
    lines: list[Line]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Returns everything, ready for JSON."""
        return {"base": self.base, "lines": [line.as_dict() for line in self.lines], "notes": self.notes}


def line(name: str, units: str, n: int, found: Mapping[str, Figure], seed: int) -> Line:
    """Returns the line of one figure, measured of every model; BASE is the title of the base's."""
    base = found[BASE]
    against = {title: against_base(own, base, seed) for title, own in found.items() if title != BASE}
    metric = Metric(base.name, base.unit)
    return Line(name, metric.words, base.lower_is_better, units, n, base.value, against)


def against_base(own: Figure, base: Figure, seed: int) -> Against:
    """Compares two figures on the same units; the interval needs parts."""
    if own.parts is None or base.parts is None or base.weights is None:
        return Against(own.value, own.value - base.value, None, None)
    return compare(own.parts, base.parts, base.weights, seed)


def compare(adapted: Tensor, base: Tensor, weights: Tensor, seed: int) -> Against:
    """Compares two models on the same units, from their parts (n,) and the units' weights (n,)."""
    total, apart = float(weights.sum()), adapted - base
    found = bootstrap.interval(apart, weights, seed=seed)
    # Without any difference, resampling says nothing.
    low, high = found if found and bool(apart.any()) else (None, None)
    return Against(float(adapted.sum()) / total, float(apart.sum()) / total, low, high)


def text(found: Evaluation) -> str:
    """Returns the comparison as a table for people."""
    wide = max(len(line.name) for line in found.lines)
    rows = []
    for each in found.lines:
        better = "lower" if each.lower_is_better else "higher"
        rows.append(
            f"{each.name:<{wide}}  {each.metric} ({better} is better; {each.n:,} {each.units}): base"
            f" {each.base:.4f}"
        )
        rows += [
            f"{'':<{wide}}    {title} {_described(a, each.lower_is_better)}"
            for title, a in each.adapters.items()
        ]
    return "\n".join([*rows, *found.notes])


def _described(a: Against, lower_is_better: bool) -> str:
    if a.low is None or a.high is None:
        return f"{a.value:.4f}  difference {a.difference:+.4f}{'' if a.difference else '  nothing differs'}"
    seen = "better" if (a.high < 0) == lower_is_better else "worse"
    if a.low <= 0 <= a.high:
        seen = "no difference seen"
    return f"{a.value:.4f}  difference {a.difference:+.4f} [{a.low:+.4f}, {a.high:+.4f}]  {seen}"
