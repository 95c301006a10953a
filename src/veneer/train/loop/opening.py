"""Keeps the evaluation before the first step for trainings that begin alike."""

from __future__ import annotations

from collections.abc import Callable

from veneer.tasks import Figure

Figures = dict[str, list[Figure]]


class Opening:
    """The evaluation before the first step, which trainings from one start share."""

    def __init__(self) -> None:
        self.figures: Figures | None = None

    def measured(self, step: int, measure: Callable[[], Figures]) -> Figures:
        """Returns the figures of an evaluation; those before the first step are measured once."""
        if step:
            return measure()
        if self.figures is None:
            self.figures = measure()
        return self.figures
