"""A finished run, read from the files in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from veneer import tasks
from veneer.tasks import Metric, Task
from veneer.train.folder.result import metric_of

PARTS = ("train", "valid", "test", "known")
NO_TEST = (
    "No test text was given: learning is reported on the valid text that chose the step, so it is a little"
    " optimistic."
)


def named(source: str) -> str:
    """Returns a source's name; for a file or folder of this machine, the last part of its path."""
    return Path(source).name if Path(source).exists() or source.startswith(("/", ".")) else source


class RunRecord(NamedTuple):
    """Contents of results.json, config.json and metrics.jsonl, and the folder, of a finished run."""

    results: Mapping[str, Any]
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    folder: Path

    @property
    def metric(self) -> Metric:
        """Returns the metric of the run's figures."""
        return metric_of(self.results)

    @property
    def task(self) -> type[Task]:
        """Returns the run's task."""
        return tasks.get(self.config["run"].get("task", tasks.DEFAULT))

    def tokens_per_second(self) -> float | None:
        """Returns the speed of the median step after warm-up, or None if it was not logged."""
        found = [line["tokens_per_second"] for line in self.lines if "tokens_per_second" in line]
        return median(found[len(found) // 10 :]) if found else None

    def memory_owner(self) -> str:
        """Returns the owner of the measured peak of memory: the GPU or the process."""
        return (
            "of the GPU"
            if self.config["run"]["device"].startswith("cuda")
            else "of the process, libraries included"
        )
