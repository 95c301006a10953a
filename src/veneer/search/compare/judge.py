"""Measures the dial of finished trials on one base: learning and forgetting at every strength."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from veneer.adapt.attach import detach
from veneer.adapt.store import store
from veneer.files import read_json
from veneer.models import machine
from veneer.runs import base_model
from veneer.runs.decide import decided
from veneer.runs.dial import dial, finite, recommend
from veneer.runs.prepare import read
from veneer.runs.texts import texts
from veneer.tasks import Task
from veneer.train.folder import layout
from veneer.train.loop.progress import Notes, Voice
from veneer.train.run import Run

FILE, NAME = "dial.json", "judged"


class Judge:
    """Reads texts and base once, for the first trial that was not measured before."""

    def __init__(self, run: Run, voice: Voice) -> None:
        self.run, self.voice = run, voice

    @cached_property
    def opened(self) -> tuple[Task, nn.Module, dict[str, list[Any]]]:
        """The task, the base, and the examples to measure by part."""
        device = machine.device(self.run.device)
        run, task, found = read(decided(self.run, device), Notes())
        model, _ = base_model.base(run, task, run.base_dtype, device, Voice(False))
        return task, model, texts.evaluated(found, run, task)

    def dial(self, trial: Path) -> dict[str, Any]:
        """Returns the points of a finished trial: chosen_by on valid text, points on test text.

        Known text is halved between the two. Measured once, and kept in the trial's folder.
        """
        file = trial / FILE
        if not file.is_file():
            layout.put(file, self._measured(trial))
        return read_json(file, ("points", "recommended"))

    def _measured(self, trial: Path) -> dict[str, Any]:
        task, model, held = self.opened
        known = held.get("known", [])
        with self.voice.phase(f"measuring strengths of {trial.name}"):
            store.load(model, trial / layout.ADAPTER, NAME, allow="zero")
            try:
                choosing, points = finite(
                    *(
                        dial(model, NAME, task, {"target": held[part], "known": half}, batch=self.run.batch)
                        for part, half in zip(("valid", "test"), _halves(known), strict=True)
                    )
                )
            finally:
                detach(model)
        return {
            "strengths": [p.strength for p in points],
            "recommended": recommend(choosing, task.METRIC),
            "chosen_by": [p.as_dict(task.METRIC) for p in choosing],
            "points": [p.as_dict(task.METRIC) for p in points],
        }


def _halves(known: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    return (known[::2], known[1::2]) if len(known) > 1 else (known, known)
