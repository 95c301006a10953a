"""Feeds a run's figures to its trackers; a failing tracker is logged and dropped, metrics.jsonl stays
complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from veneer.errors import FormatError, NotWritten
from veneer.files import read_json
from veneer.train.folder import layout
from veneer.train.loop.progress import Voice
from veneer.train.track.base import Tracker, get, numbers

KEPT = "track.json"  # what each library calls the run, so that a resumed run goes on under the same name


class Feed:
    """The trackers of one run. As a context it ends those that are still at work, whatever happened."""

    def __init__(self, names: Sequence[str], out: Path, config: Mapping[str, Any], voice: Voice) -> None:
        self.folder, self.config, self.voice = out, config, voice
        self.at_work: dict[str, Tracker] = {name: get(name)() for name in names}

    def start(self, step: int) -> None:
        """Begins after `step` steps, or goes on under the names that an earlier start has kept."""
        if not self.at_work:
            return
        known = self._known()

        def begin(name: str, tracker: Tracker) -> None:
            known[name] = tracker.start(self.folder, self.config, step=step, known=known.get(name))

        self._each(begin)
        try:
            layout.put(self.folder / KEPT, known)
        except (OSError, NotWritten) as e:
            self.voice.say(
                f"{self.folder / KEPT} could not be written: {e}; a resumed run would begin anew in its"
                " trackers"
            )

    def _known(self) -> dict[str, Any]:
        try:
            return read_json(self.folder / KEPT) if (self.folder / KEPT).exists() else {}
        except FormatError as e:
            self.voice.say(f"{e}; the run begins anew in its trackers")
            return {}

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self.at_work:
            figures = numbers({k: v for k, v in line.items() if k != "step"})
            self._each(lambda name, tracker: tracker.log(line["step"], figures))

    def finish(self, results: Mapping[str, Any] | None) -> None:
        """Ends. results: results.json, or None for a run that was stopped."""
        self._each(lambda name, tracker: tracker.finish(results))
        self.at_work.clear()

    def _each(self, do: Callable[[str, Tracker], None]) -> None:
        for name, tracker in list(self.at_work.items()):
            try:
                do(name, tracker)
            except Exception as e:  # whatever a library raises: no training is lost by it
                del self.at_work[name]
                what = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
                self.voice.say(
                    f"tracker {name} failed ({what}) and gets no more figures; the run goes on, and"
                    " metrics.jsonl has them all"
                )

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(None)
