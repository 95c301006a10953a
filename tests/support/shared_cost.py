"""Bytes that a process of a training exchanges and holds in a step."""

from __future__ import annotations

import time
from contextlib import nullcontext
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
    """Trains a few steps; returns the bytes of the second one on the wire, and those at its peak.

    processor: the least seconds of a later step.
    """
    found: list[dict[str, float]] = []
    step, agree = Learner.step, Loop.agree

    def watched(own: Learner, *more: Any) -> Any:
        live = Live()
        started = time.process_time()
        with wire.counted() as counted, live if len(found) == 1 else nullcontext():
            outcome = step(own, *more)
        took = time.process_time() - started
        tensors = [*own.model.parameters(), *own.model.buffers()]
        tensors += [t for s in own.optimiser.state.values() for t in s.values()]
        tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        held = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        found.append({"wire": counted.total, "peak": held + live.made.peak, "processor": took})
        return outcome

    def agreed(own: Loop, *more: Any) -> None:
        with wire.counted() as counted:
            agree(own, *more)
        if found:
            found[-1]["wire"] += counted.total

    with mock.patch.object(Learner, "step", watched), mock.patch.object(Loop, "agree", agreed):
        fit_until(Run.from_dict(given), 99, world=world)
    timed = [f["processor"] for f in found[2:]]
    return {**found[1], "processor": min(timed)}
