"""A worker of Ray Train: trains as a process of torchrun does, and tells the driver through an actor."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from typing import Any, NamedTuple, TextIO, cast

from veneer.errors import VeneerError
from veneer.launcher import launched
from veneer.tasks.base.custom import Loss
from veneer.train.group import Lost
from veneer.train.loop.signals import Wish, hearing
from veneer.train.run import Run

LOOK = 0.3  # seconds between two questions to the desk


class Desk:
    """An actor that all workers reach: keeps their lines, and the error that no restart would cure."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.error: tuple[type[VeneerError], tuple[Any, ...], dict[str, Any]] | None = None
        self.starts, self.signal = 0, 0

    def start(self, first: bool) -> bool:
        """Counts the starts of the first worker; returns True if the training has ended by an error."""
        self.starts += first
        if first and self.starts > 1 and self.error is None:
            self.say(f"restart {self.starts - 1}: a worker was lost; all go on from the newest checkpoint")
        return self.error is not None

    def stop(self, number: int) -> None:
        """Asks the workers to save and end, as for a signal."""
        self.signal = number

    def wanted(self) -> int:
        """Returns the number of the signal that came to the driver, or 0."""
        return self.signal

    def say(self, line: str) -> None:
        """Keeps a line for the driver."""
        self.lines.append(line)

    def end(self, kind: type[VeneerError], args: tuple[Any, ...], state: dict[str, Any]) -> None:
        """Keeps the first error in parts: not every class can be pickled."""
        self.error = self.error or (kind, args, state)

    def news(self) -> tuple[list[str], Any]:
        """Returns the lines since the last call, and the parts of the error or None."""
        lines, self.lines = self.lines, []
        return lines, self.error


class Plan(NamedTuple):
    """All that a worker needs. folder: the directory from which relative paths of the run start."""

    run: Run
    desk: Any
    folder: str
    progress: bool
    objective: Loss | None


class Lines:
    """A stream that sends every whole line to the desk."""

    def __init__(self, desk: Any) -> None:
        self.desk, self.rest = desk, ""

    def write(self, text: str) -> int:
        """Sends the lines that the text completes."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.desk.say.remote(line)
        return len(text)

    def flush(self) -> None:
        """Sends nothing: an incomplete line waits."""

    def isatty(self) -> bool:
        """Returns False: a bar would send a line for every step."""
        return False


def work(given: dict[str, Plan]) -> None:
    """Trains, from the newest checkpoint if there is one. Returns at once if an error ended an earlier start.

    Raises VeneerError alone, which Ray can pickle, so that all workers end.
    """
    import ray

    from veneer.runs.fit import fit

    plan = given["plan"]
    if ray.get(plan.desk.start.remote(launched().first)):
        return
    with suppress(OSError):  # a machine without the driver's directory: paths must be absolute
        os.chdir(plan.folder)
    try:
        with redirect_stderr(cast(TextIO, Lines(plan.desk))), following(plan.desk, ray.get):
            fit(replace(plan.run, resume=True), progress=plan.progress, objective=plan.objective)
    except Lost as e:  # another worker ended: a restart may cure it, and the driver gives the advice
        raise VeneerError(e.text.partition("; see its")[0]) from None
    except VeneerError as e:
        ray.get(plan.desk.end.remote(type(e), e.args, e.__dict__))
        raise VeneerError(e.text) from None


@contextmanager
def following(desk: Any, get: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block a training of this thread stops once the desk wants it. get: that of Ray."""
    wish, ended = Wish(), threading.Event()

    def ask() -> None:
        while wish.number is None and not ended.wait(LOOK):
            wish.number = get(desk.wanted.remote()) or None

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        with hearing(wish):
            yield
    finally:
        ended.set()
        asking.join()


def rebuilt(kind: type[VeneerError], args: tuple[Any, ...], state: dict[str, Any]) -> VeneerError:
    """Returns the error of a worker, from the parts that the desk kept."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error
