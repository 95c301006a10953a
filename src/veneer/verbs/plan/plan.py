"""Forecasts the memory, operations and time of a training, without writing anything."""

from __future__ import annotations

import math

import torch

from veneer import tasks
from veneer.adapt.attached import n_base_parameters
from veneer.adapt.switch import using
from veneer.analyse.cost import process_memory, simulate
from veneer.compress.quantise import as_plain
from veneer.data.order.order import Order
from veneer.errors import ConfigError
from veneer.models import machine
from veneer.runs import fit as training
from veneer.runs.prepare import Ready, prepare
from veneer.runs.texts import texts
from veneer.tasks.base.abilities import Outlined
from veneer.tasks.base.shape import Shape
from veneer.train.loop.progress import Voice
from veneer.train.loop.schedule import Pace
from veneer.train.run import Run
from veneer.verbs.plan import room
from veneer.verbs.plan.layers import layers
from veneer.verbs.plan.probe import measure
from veneer.verbs.plan.result import Length, Plan
from veneer.verbs.plan.smaller import halving


def plan(run: Run, *, probe: bool = True, progress: bool = True) -> Plan:
    """Returns the forecast of `fit` with these settings.

    probe: takes five steps on the run's texts, in memory, to measure seconds and bytes. Without it, or where
    the training would not fit, memory is estimated from shapes. progress: prints notes on stderr. Raises the
    errors of `fit` for impossible settings, and NoRoom if the model alone does not fit. A base that exceeds
    the memory is planned with `stream_base`.
    """
    voice, device = Voice(progress), machine.device(run.device)
    if not issubclass(tasks.get(run.task), Outlined):
        raise ConfigError(f"plan needs a task that states its shapes, which {run.task!r} does not")
    run = room.fitting(run, device, voice.say)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        ready = prepare(run, device, voice, only_shapes=True)
        held = process_memory.forget_peak(device)
        examples = ready.texts["train"].examples
        order, pace = training.lay_out(ready.run, ready.task, examples)
        rows = min(ready.run.batch, order.total)
        passes = min(ready.run.accumulate, math.ceil(order.total / rows))
        shape = ready.task.shape(examples, rows, passes)
        with voice.phase("simulating a step"):
            own, full = _simulated(ready, shape)
        available = process_memory.available(device)
        problem = room.problem(own.memory.growth, available, device)
        with voice.phase("measuring five steps"):
            measured = measure(ready, order, pace, held=held) if probe and problem is None else None
        with voice.phase("simulating smaller settings"):  # last: memory it leaves free would hide growth
            trials = halving(ready, shape, own.memory)
    if measured:
        own = own._replace(memory=measured.corrected(own.memory))
    return Plan(
        run=ready.run,
        layers=layers(ready),
        trained=sum(p.parameter.numel() for p in ready.parts),
        base=n_base_parameters(ready.model),
        memory=own.memory,
        full=full.memory,
        flops=own.flops,
        full_flops=full.flops,
        length=_length(ready, order, pace),
        measured=measured,
        halving=trials,
        cache_frozen=ready.frozen.bytes(sum(map(ready.task.size, examples))) if ready.frozen else None,
        available=available,
        problem=problem,
    )


def _simulated(ready: Ready, shape: Shape) -> tuple[simulate.Step, simulate.Step]:
    """Returns a step of this method, and one of full fine-tuning."""
    narrow = ready.run.precision == "bf16"
    states, task = ready.optimiser.state_bytes(ready.trained), ready.task
    assert isinstance(task, Outlined)  # checked at the start of the plan
    if ready.run.trains_base:
        own = simulate.step(ready.model, shape, task, full=True, autocast=narrow, states=states)
        return own, own
    own = simulate.step(ready.model, shape, task, states=states)
    own = own._replace(memory=room.in_memory(ready.model, own.memory))
    with using(ready.model), as_plain(ready.model):
        return own, simulate.step(ready.model, shape, task, full=True, base=torch.float32, autocast=narrow)


def _length(ready: Ready, order: Order, pace: Pace) -> Length:
    run, examples = ready.run, ready.texts["train"].examples
    evaluations = sum(pace.evaluates(step) for step in range(pace.steps + 1))
    measured = texts.evaluated(ready.texts, run, ready.task)
    batches = {part: math.ceil(len(some) / run.batch) for part, some in measured.items()}
    # Test text is measured before and after only.
    often = {part: 2 if part == "test" else evaluations for part in batches}
    tokens = round(order.total * sum(map(ready.task.size, examples)) / len(examples))
    return Length(order.steps, tokens, evaluations, sum(n * batches[part] for part, n in often.items()))
