"""Reports on stderr: notes, a bar on a terminal, and elsewhere a line every ten seconds of a long phase."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from veneer.foreign import visible

INTERVAL = 10.0  # seconds between two lines of a phase


class Notes:
    """Keeps sentences in `said` for the record."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        """Keeps a sentence."""
        self.said.append(sentence)


class Voice(Notes):
    """Prints notes and progress if `aloud`, and keeps all notes for the record."""

    def __init__(self, aloud: bool) -> None:
        super().__init__()
        self.aloud = aloud
        self._progress: Any = None
        self._task: Any = None
        self._now = ""  # the phase, and how far it is
        self._begun = 0.0
        self._steps = 0

    def say(self, sentence: str) -> None:
        """Prints a note on stderr, above the bar if there is one."""
        super().say(sentence)
        if self.aloud:
            self._print(sentence)

    def tell(self, sentence: str) -> None:
        """Prints a sentence without keeping it."""
        if self.aloud:
            self._print(sentence)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what goes on within the block, every ten seconds or beside the bar. Phases nest."""
        before, first = self._now, not self._now
        self._now = name
        if first:
            self._begun = time.monotonic()
        if self._progress is not None:
            self._progress.update(self._task, numbers=name)
        try:
            with _every(INTERVAL, self._beat) if self.aloud and first else nullcontext():
                yield
        finally:
            self._now = before

    @contextmanager
    def bar(self, steps: int, done: int) -> Iterator[None]:
        """Lets `show` move a bar within the block; without a terminal or `rich` it is a phase."""
        self._steps = steps
        progress = _progress() if self.aloud and sys.stderr.isatty() else None
        if progress is None:
            with self.phase("training"):
                yield
            return
        with progress:
            self._progress = progress
            self._task = progress.add_task("training", total=steps, completed=done, numbers="")
            try:
                yield
            finally:
                self._progress = None

    def show(self, step: int, numbers: str, doing: str = "training") -> None:
        """Moves the bar to a step; `doing` is its label, `numbers` the text behind it."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers, description=doing)
        elif self._now:
            self._now = (
                f"step {step} of {self._steps}: {numbers}" if doing == "training" else f"{doing} {numbers}"
            )

    def _beat(self) -> None:
        if self._progress is None:
            self._print(f"{self._now} ({time.monotonic() - self._begun:.0f} s)")

    def _print(self, line: str) -> None:
        line = visible(line)
        if self._progress is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` in a thread of its own, every so many seconds within the block."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(seconds):
            act()

    thread = threading.Thread(target=beat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _progress() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    console = Console(file=sys.stderr)  # honours NO_COLOR
    return Progress(
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
    )
