"""trackio: its own store of this machine's runs (TRACKIO_DIR).

To look at it: trackio show --project veneer
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from veneer.train.track.base import Tracker, numbers, title

PROJECT = "veneer"
ELSEWHERE = (
    "TRACKIO_SPACE_ID",
    "TRACKIO_SERVER_URL",
    "TRACKIO_WEBHOOK_URL",
)  # each would send figures over the network


class Trackio(Tracker):
    """One run of the project "veneer", on this machine alone."""

    packages = ("trackio",)

    def start(self, folder: Path, config: Mapping[str, Any], *, step: int, known: str | None) -> str:
        import trackio

        name = known or f"{title(folder)}-{uuid.uuid4().hex[:6]}"  # its runs are found by their names
        with _local():
            self.run: Any = trackio.init(
                project=PROJECT,
                name=name,
                config=dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return name

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def finish(self, results: Mapping[str, Any] | None) -> None:
        if results is not None:
            self.run.log(
                {f"results.{name}": value for name, value in numbers(results).items()}, step=results["steps"]
            )
        with redirect_stdout(sys.stderr):
            self.run.finish()


@contextmanager
def _local() -> Iterator[None]:
    """Sends trackio's output to stderr and hides the variables that would upload figures."""
    hidden = {name: os.environ.pop(name) for name in ELSEWHERE if name in os.environ}
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.environ.update(hidden)
