"""The result of a finished run: results.json, and the same as an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from veneer import tasks
from veneer.files import read_json
from veneer.tasks import Figure, Metric
from veneer.train.folder import layout
from veneer.train.loop.state import Position, known

NEEDED = ("before", "after", "learned", "forgotten")  # keys of results.json that its readers need


class Change(NamedTuple):
    """The metric on a text before and after the training."""

    before: float
    after: float


@dataclass(frozen=True)
class Result:
    """A finished run. metrics: results.json; metric: of the figures; learned: on test text, else on valid
    text.

    forgotten: on known text, None without one.
    """

    folder: Path
    metrics: dict[str, Any]
    learned: Change
    forgotten: Change | None
    metric: Metric

    @property
    def adapter(self) -> Path:
        """Returns the adapter's folder."""
        return self.folder / layout.ADAPTER

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Returns the result of a finished run from its folder. Raises FormatError."""
        metrics = read_json(folder / layout.RESULTS, NEEDED)
        forgotten = metrics["forgotten"]
        learned = Change(metrics["learned"]["before"], metrics["learned"]["after"])
        return cls(
            folder,
            metrics,
            learned,
            Change(forgotten["before"], forgotten["after"]) if forgotten else None,
            metric_of(metrics),
        )


def metric_of(results: Mapping[str, Any]) -> Metric:
    """Returns the metric of a results.json; those of earlier versions name none and are language models'."""
    found = results.get("metric")
    return tasks.get(tasks.DEFAULT).METRIC if found is None else Metric(**found)


def figures(metric: Metric, position: Position, test: Mapping[str, Sequence[Figure]]) -> dict[str, Any]:
    """Returns metric, before, after, learned and forgotten for results.json. test: measured at the best
    step."""
    after = {**position.best, **{text: some[0].value for text, some in test.items()}}
    before, reported = position.before, "test" if "test" in after else "valid"
    pair = {name: {"before": before[name], "after": after[name]} for name in after}
    further = {text: {f.name: known(f.value) for f in some[1:]} for text, some in test.items() if some[1:]}
    others = {
        "before": position.others.get("before", {}),
        "after": {**position.others.get("best", {}), **further},
    }
    return {
        "metric": metric._asdict(),
        **({"others": others} if any(others.values()) else {}),
        "before": before,
        "after": after,
        "learned": {"text": reported, **pair[reported]},
        "forgotten": pair.get("known"),
    }
