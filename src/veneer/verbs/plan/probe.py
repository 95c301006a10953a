"""Measures seconds and bytes of three steps of a training, in memory, after two that warm up."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

from veneer.analyse.cost import process_memory
from veneer.analyse.cost.memory import Live, Saved
from veneer.analyse.cost.simulate import Memory
from veneer.data.order.order import Order
from veneer.data.spread import spread
from veneer.runs.learner import learner as learner_of
from veneer.runs.prepare import Ready
from veneer.train.loop.progress import Voice
from veneer.train.loop.schedule import Pace
from veneer.train.loop.step import Learner
from veneer.train.speed.compiling import eagerly

WARM, STEPS = 2, 3  # the first step chooses kernels, the second still asks the system for memory


class Measured(NamedTuple):
    """Medians a step: seconds, and processor_seconds, which do not grow while other programs compute.

    evaluation_seconds: of one batch; growth: bytes of the process, or of the GPU, at the peak over the loaded
    model, None where the system does not report them; live: bytes of all tensors at once over the loaded
    model; activations: bytes kept for the backward.
    """

    seconds: float
    processor_seconds: float
    evaluation_seconds: float
    growth: int | None
    live: int
    activations: int

    def corrected(self, estimate: Memory) -> Memory:
        """Returns the estimate with measured numbers in place of estimated ones."""
        peak = estimate.weights + estimate.adapter + self.live
        return estimate._replace(activations=self.activations, peak=peak)


def measure(ready: Ready, order: Order, pace: Pace, *, held: int | None) -> Measured:
    """Returns the seconds and bytes of a few steps spread over the run, as batches may differ; trains the
    model.

    held: bytes of the loaded model, from `process_memory.forget_peak`. Raises the errors of training.
    """
    device = next(ready.model.parameters()).device
    learner = learner_of(ready, order, Voice(False))
    evaluation = _evaluate(learner, ready, order)
    steps = [i * order.steps // (WARM + STEPS) for i in range(WARM + STEPS)]
    times = [_timed(learner, order, pace, step) for step in steps]
    walls, processors = zip(*times[WARM:], strict=True)
    most = process_memory.peak(device)
    growth = None if held is None or most is None else most - held
    live, saved = _counted(learner, order)
    return Measured(statistics.median(walls), statistics.median(processors), evaluation, growth, live, saved)


def _timed(learner: Learner, order: Order, pace: Pace, step: int) -> tuple[float, float]:
    """Returns the seconds and the processor seconds of a step."""
    started = time.monotonic(), time.process_time()
    learner.step(order.step(step), pace.rate(step))
    return time.monotonic() - started[0], time.process_time() - started[1]


def _evaluate(learner: Learner, ready: Ready, order: Order) -> float:
    """Returns the seconds of one batch of evaluation: the second one of each text, once all is loaded."""
    seconds = 0.0
    measured = [spread(t.examples, 2 * order.batch) for part, t in ready.texts.items() if part != "train"]
    for examples in measured:
        for batch in (examples[: order.batch], examples[-order.batch :]):
            started = time.monotonic()
            with eagerly():
                ready.task.measure(learner.model, batch, batch=order.batch)
            seconds = time.monotonic() - started
    return seconds


def _counted(learner: Learner, order: Order) -> tuple[int, int]:
    """Returns the bytes alive at once over model and adapter, and those kept for one backward pass."""
    state = [t for s in learner.optimiser.state.values() for t in s.values()]
    held = sum(t.numel() * t.element_size() for t in state)
    live, saved = Live(), Saved([*learner.model.parameters(), *learner.model.buffers()])
    with eagerly(), live, saved.watching():
        learner.step(order.step(0), 0.0)
    return live.made.peak + held, saved.kept.peak
