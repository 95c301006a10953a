"""Bytes that a process of a training exchanges and holds in a step."""

from __future__ import annotations

from typing import Any
from unittest import mock

from support import wire
from torch.distributed.tensor import DTensor

from veneer.analyse.cost.memory import Live
from veneer.runs.fit import fit_until
from veneer.train.loop.loop import Loop
from veneer.train.loop.step import Learner
from veneer.train.run import Run
from veneer.train.world import World


def measured(world: World, given: dict[str, Any]) -> dict[str, float]:
    """Trains a few steps; returns the bytes of the second one on the wire, and those at its peak."""
    found: list[dict[str, float]] = []
    step, agree = Learner.step, Loop.agree

    def watched(own: Learner, *more: Any) -> Any:
        live = Live()
        with wire.counted() as counted, live:
            outcome = step(own, *more)
        tensors = [*own.model.parameters(), *own.model.buffers()]
        tensors += [t for s in own.optimiser.state.values() for t in s.values()]
        tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        held = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        found.append({"wire": counted.total, "peak": held + live.made.peak})
        return outcome

    def agreed(own: Loop, *more: Any) -> None:
        with wire.counted() as counted:
            agree(own, *more)
        if found:
            found[-1]["wire"] += counted.total

    with mock.patch.object(Learner, "step", watched), mock.patch.object(Loop, "agree", agreed):
        fit_until(Run.from_dict(given), 99, world=world)
    return found[1]
