"""What a training tells people, on stderr: sentences worth knowing, and a bar where there is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Voice:
    """Says sentences, if `aloud`, and keeps all of them in `said` for the record; shows a bar within `bar`."""

    def __init__(self, aloud: bool) -> None:
        self.aloud = aloud
        self.said: list[str] = []
        self._progress: Any = None
        self._task: Any = None

    def say(self, sentence: str) -> None:
        """One sentence on stderr, above the bar if there is one."""
        self.said.append(sentence)
        if not self.aloud:
            return
        if self._progress is None:
            print(sentence, file=sys.stderr, flush=True)
        else:
            self._progress.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, steps: int, done: int) -> Iterator[None]:
        """Within the block `show` moves a bar; nothing but sentences without a terminal, or without `rich`."""
        progress = _progress() if self.aloud and sys.stderr.isatty() else None
        if progress is None:
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
        """Moves the bar; `doing` is its label, `numbers` what stands behind it."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers, description=doing)


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
