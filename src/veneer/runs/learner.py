"""Builds the learner of a run: parameters, optimiser, and an objective as fast as the run's length pays
for."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from veneer.compress.trp import runs as trp
from veneer.data.order.order import Order
from veneer.errors import ConfigError, option
from veneer.optim.base.owned import Owned
from veneer.runs.prepare import Ready
from veneer.tasks import Batch, Objective
from veneer.tasks.base.abilities import Draws
from veneer.train import allocation
from veneer.train.loop.progress import Voice
from veneer.train.loop.room import Room
from veneer.train.loop.step import Learner, under_autocast
from veneer.train.mean import Mean
from veneer.train.run import Run
from veneer.train.speed import compiling
from veneer.train.speed.frozen_cache import Kept
from veneer.train.world import ALONE, World


def learner(ready: Ready, order: Order, voice: Voice, world: World = ALONE) -> Learner:
    """Returns everything that a step needs, compiled if the run says so. `compiling.restore` undoes it.

    Raises ConfigError if the run asks for compilation that model or machine cannot do.
    """
    run, device = ready.run, next(ready.model.parameters()).device
    optimiser = ready.optimiser.build(ready.trained)
    if isinstance(optimiser, Owned):
        optimiser.divide(world.rank, world.size, world.share)
    plain = Learner(
        ready.model,
        ready.parts,
        optimiser,
        ready.task,
        ready.task.loss,
        run.clip,
        run.weight_decay,
        run.label_smoothing,
        world=world,
        room=Room(voice.say),
        idle=ready.task.trial(ready.texts["train"].examples) if run.shard else None,
        mean=Mean(ready.parts, run.ema) if run.ema else None,
    )
    trp.hold(ready.model, plain.optimiser, run)
    if run.ema and allocation.trained(ready.model):
        raise ConfigError(
            f"{option('ema')} averages parameters of one size, and adalora's shrink; leave it out"
        )
    allocation.hold(ready.model, plain.optimiser, order.steps)
    if not _compiles(ready, order, device, voice):
        objective = compiling.prepare(ready.model, ready.task, _first_batch(plain, order, device))
        return plain._replace(objective=in_precision(run, objective, device))
    return _compiled(ready, plain, order, voice)


def keeping(ready: Ready, learner: Learner, order: Order, voice: Voice) -> Learner:
    """Returns the learner with a cache of frozen blocks, if the run asks for one. Raises ConfigError."""
    if ready.frozen is None:
        return learner
    run, train = ready.run, ready.texts["train"]
    if order.total <= len(train.examples):
        voice.say(
            f"no {ready.task.EXAMPLE} is read twice in this run, so cache_frozen saves nothing; leave it"
            " out, or"
            " train for more epochs"
        )
    depends = {name: getattr(run, name) for name in ("length", "packing", "quantise", "device")}
    key = {**depends, **{name: ready.config[name] for name in ("base", "versions")}, "data": train.facts}
    return learner._replace(
        kept=Kept(ready.model, ready.frozen, ready.task, train.examples, Path(run.out), key)
    )


def in_precision(run: Run, objective: Objective, device: torch.device) -> Objective:
    """Returns the objective as the run computes it: under autocast for float32 weights trained in bf16."""
    return under_autocast(objective, device) if _autocast(run) else objective


def precision(run: Run, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Returns the context in which the run measures texts."""
    return (lambda: torch.autocast(device.type, torch.bfloat16)) if _autocast(run) else nullcontext


def _autocast(run: Run) -> bool:
    return run.trains_base and run.precision == "bf16"


def _first_batch(learner: Learner, order: Order, device: torch.device) -> Batch:
    """Returns this process' share of the first batch, or all of it where it has no share.

    A task that draws gets all of it: a dry run then draws as much as that of one process.
    """
    micro = order.step(0)
    whole = isinstance(learner.task, Draws) and learner.shapes is None
    own = micro if whole else learner.world.shares(micro, learner.task.COMPARES)
    return learner.batch((own or micro)[0], device)


def _compiles(ready: Ready, order: Order, device: torch.device, voice: Voice) -> bool:
    """Tells if the run is compiled.

    Raises ConfigError if it must be and cannot; reports if it only would pay.
    """
    run = ready.run
    if run.stream_base:
        return False
    lacking, asked = compiling.missing(device), run.compile in ("on", "graphs")
    if asked and lacking:
        raise ConfigError(
            f"compile={run.compile!r} needs {lacking}, not found here; install it, or use compile='off'"
        )
    long = compiling.is_long(ready.model, order.total * run.window, device)
    if run.compile == "auto" and long and lacking:
        voice.say(f"steps of this run could be shorter: torch.compile needs {lacking}, not found here")
    return asked or (run.compile == "auto" and long and not lacking)


def _compiled(ready: Ready, plain: Learner, order: Order, voice: Voice) -> Learner:
    """Returns the learner with blocks and loss compiled; the plain one if that fails and the run allows
    both."""
    run, task, device = ready.run, ready.task, next(ready.model.parameters()).device
    rows = run.batch if task.COMPARES else math.ceil(run.batch / plain.world.size)
    learner = plain._replace(shapes=compiling.Shapes(rows, compiling.widths(run.window, run.packing)))
    batch = _first_batch(learner, order, device)
    objective = compiling.prepare(
        ready.model, task, batch, compiled=True, with_graphs=run.compile == "graphs"
    )
    objective = in_precision(run, objective, device)
    try:
        with voice.phase("compiling the model"):
            seconds = compiling.warm_up(ready.model, objective, batch, smoothing=run.label_smoothing)
    except ConfigError as e:
        if run.compile != "auto":
            raise
        voice.say(f"{e}; continues without")
        objective = compiling.prepare(ready.model, task, batch)
        return plain._replace(objective=in_precision(run, objective, device))
    voice.say(f"compiled in {math.ceil(seconds)} s")
    return learner._replace(objective=objective)
