"""Holds the forecast of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from veneer.analyse.cost import simulate
from veneer.analyse.cost.simulate import Memory
from veneer.train.parts.change import FULL
from veneer.train.run import Run
from veneer.verbs.plan.layers import Layer
from veneer.verbs.plan.probe import Measured
from veneer.verbs.plan.smaller import Trial


class Length(NamedTuple):
    """Length of a training: tokens without padding of all steps, batches of all evaluations."""

    steps: int
    tokens: int
    evaluations: int
    batches: int


@dataclass(frozen=True)
class Plan:
    """Forecast of a training, memory in bytes.

    measured: seconds and bytes of a few steps, None without a probe; cache_frozen: bytes on disk, None
    without that cache; problem: the reason why the training will not fit, or None.
    """

    run: Run
    layers: list[Layer]
    trained: int
    base: int
    memory: Memory
    full: Memory
    flops: simulate.Flops
    full_flops: simulate.Flops
    length: Length
    measured: Measured | None
    halving: list[Trial]
    cache_frozen: int | None
    available: int | None
    problem: str | None

    @property
    def share(self) -> float:
        """Returns the trained numbers over those of the base."""
        return self.trained / self.base

    @property
    def growth(self) -> int:
        """Returns the bytes on top of the loaded model, measured if possible, else estimated."""
        found = self.measured.growth if self.measured else None
        return self.memory.growth if found is None else found

    @property
    def seconds(self) -> float | None:
        """Returns the seconds of the training and its evaluations, None without a probe."""
        if self.measured is None:
            return None
        evaluations = self.length.batches * self.measured.evaluation_seconds
        return self.length.steps * self.measured.seconds + evaluations

    def as_dict(self) -> dict[str, Any]:
        """Returns everything, ready for JSON."""
        run = self.run
        settings = ("model", "method", "device", "precision", "batch", "accumulate", "length", "stream_base")
        return {
            **{name: getattr(run, name) for name in settings},
            "layers": [
                {("in" if k == "in_" else k): v for k, v in layer._asdict().items()} for layer in self.layers
            ],
            "trained_parameters": self.trained,
            "base_parameters": self.base,
            "share": self.share,
            "memory_bytes": {
                run.method: self.memory._asdict(),
                **({} if run.trains_base else {FULL: self.full._asdict()}),
            },
            "memory_is": "measured" if self.measured else "estimated from shapes",
            "growth_bytes": self.growth,
            "available_bytes": self.available,
            "flops_per_step": {
                **self.flops._asdict(),
                "total": self.flops.total,
                "full_total": self.full_flops.total,
            },
            **self.length._asdict(),
            "probe": self.measured._asdict() if self.measured else None,
            "seconds": self.seconds,
            "halving": [t._asdict() for t in self.halving],
            "cache_frozen_bytes": self.cache_frozen,
            "fits": self.problem is None,
            "problem": self.problem,
        }
