"""Figures: one number that says how good a model is, whatever the metric."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Metric(NamedTuple):
    """A kind of figure. name: a short word for files, such as bpb; unit: words for people."""

    name: str
    unit: str = ""
    lower_is_better: bool = True

    @property
    def words(self) -> str:
        """Returns the unit, or the name of a metric without one."""
        return self.unit or self.name

    @property
    def better(self) -> str:
        """Returns "lower" or "higher"."""
        return "lower" if self.lower_is_better else "higher"

    def cost(self, value: float) -> float:
        """Returns the value so that less is better."""
        return value if self.lower_is_better else -value

    def beats(self, value: float, other: float) -> bool:
        """Tells if `value` is strictly better than `other`."""
        return self.cost(value) < self.cost(other)


class Figure(NamedTuple):
    """A measured metric. parts, weights (n,): sum(parts) / sum(weights) is the value, over examples or
    documents.

    Both are None for values of another form, and unless `each` was requested.
    """

    name: str
    value: float
    unit: str = ""
    lower_is_better: bool = True
    parts: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def of(cls, metric: Metric, parts: Tensor, weights: Tensor) -> Figure:
        """Returns the ratio of the sums of parts (n,) and weights (n,)."""
        return cls(
            metric.name,
            float(parts.sum() / weights.sum()),
            metric.unit,
            metric.lower_is_better,
            parts,
            weights,
        )

    def beats(self, value: float) -> bool:
        """Tells if the figure is strictly better than another value of its metric."""
        return self.metric.beats(self.value, value)

    @property
    def metric(self) -> Metric:
        """Returns the kind of the figure."""
        return Metric(self.name, self.unit, self.lower_is_better)
