"""Says in words which contenders differ by more than the noise of their seeds, and which tie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from veneer.ops.intervals import LEVEL, Difference, holm, of_difference
from veneer.tasks import Metric


class Verdict(NamedTuple):
    """Two contenders. difference: first minus second; p: adjusted for the number of pairs (Holm).

    better: the label of the better one, "" for a tie or for too few seeds to tell.
    """

    first: str
    second: str
    difference: Difference
    p: float | None
    better: str

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "difference": self.difference._asdict()}

    def sentence(self, metric: Metric) -> str:
        """Returns the verdict in words."""
        d = self.difference
        if d.low is None or d.high is None:
            pair = f"{self.first} and {self.second} differ by {d.mean:+.4g}"
            return f"{pair}; one seed each cannot tell this from noise"
        spread = f"{d.mean:+.4g} {metric.words}, 95 % interval {d.low:+.4g} to {d.high:+.4g}"
        if not self.better:
            return f"{self.first} and {self.second} tie: the difference is inside the noise ({spread})"
        worse = self.second if self.better == self.first else self.first
        return f"{self.better} beats {worse} ({self.first} - {self.second}: {spread})"


def verdicts(scores: Mapping[str, Sequence[float]], metric: Metric, level: float = LEVEL) -> list[Verdict]:
    """Returns a verdict on every pair of contenders with scores.

    scores: the metric by contender, one for each seed. Welch's test for each pair, adjusted so that all
    verdicts together call a difference by chance with a probability of at most 1 - level.
    """
    pairs = list(combinations([label for label, values in scores.items() if values], 2))
    found = [of_difference(scores[a], scores[b], level) for a, b in pairs]
    adjusted = iter(holm([d.p for d in found if d.p is not None]))
    return [_verdict(a, b, d, adjusted, metric, level) for (a, b), d in zip(pairs, found, strict=True)]


def _verdict(first: str, second: str, d: Difference, adjusted: Any, metric: Metric, level: float) -> Verdict:
    if d.p is None:
        return Verdict(first, second, d, None, "")
    p = next(adjusted)
    better = (first if metric.cost(d.mean) < 0 else second) if p < 1 - level else ""
    return Verdict(first, second, d, p, better)


def ties_with_best(found: Sequence[Verdict], scores: Mapping[str, float], metric: Metric) -> list[str]:
    """Returns the best contender by mean score and those that tie with it, best first."""
    if not scores:
        return []
    order = sorted(scores, key=lambda label: metric.cost(scores[label]))
    beaten = {v.second if v.better == v.first else v.first for v in found if v.better == order[0]}
    return [order[0], *(label for label in order[1:] if label not in beaten)]
