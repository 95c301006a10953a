"""What a run trains with: parameters, optimiser, and an objective made as fast as the run is long."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from veneer import tasks
from veneer.data.order import Order
from veneer.errors import ConfigError
from veneer.runs.prepare import Ready
from veneer.tasks import Objective
from veneer.train.loop.progress import Voice
from veneer.train.loop.step import Learner, under_autocast
from veneer.train.run import Run
from veneer.train.speed import compiling
from veneer.train.speed.frozen_cache import Kept

OBJECTIVE = "causal_lm"


def learner(ready: Ready, order: Order, voice: Voice) -> Learner:
    """Everything that a step needs. What layers share is found out, and the model compiled where the run says so.

    Raises ConfigError where it says so and the model or the machine does not allow it. `compiling.restore` undoes it.
    """
    run, device = ready.run, next(ready.model.parameters()).device
    optimiser = ready.optimiser.build(ready.trained)
    objective, smoothing = tasks.get(OBJECTIVE), run.label_smoothing
    plain = Learner(
        ready.model, ready.parts, optimiser, objective, ready.pad, run.clip, run.weight_decay, smoothing
    )
    if not _compiles(ready, order, device, voice):
        objective = compiling.prepare(ready.model, plain.batch(order.step(0)[0], device))
        return plain._replace(objective=in_precision(run, objective, device))
    return _compiled(ready, plain, order, voice)


def keeping(ready: Ready, learner: Learner, order: Order, voice: Voice) -> Learner:
    """The same, that computes the frozen blocks once for each window, where the run asks for that. Raises ConfigError."""
    if ready.frozen is None:
        return learner
    run, train = ready.run, ready.texts["train"]
    if order.total <= len(train.windows):
        voice.say(
            "no window is read twice in this run, so that cache_frozen gains nothing; leave it out, or train for more epochs"
        )
    depends = {name: getattr(run, name) for name in ("length", "packing", "quantise", "device")}
    key = {**depends, **{name: ready.config[name] for name in ("base", "versions")}, "data": train.facts}
    return learner._replace(
        kept=Kept(ready.model, ready.frozen, train.windows, Path(run.out), key, pad=ready.pad)
    )


def in_precision(run: Run, objective: Objective, device: torch.device) -> Objective:
    """The objective as the run computes it: under autocast where float32 weights are trained in bf16."""
    return under_autocast(objective, device) if run.trains_base and run.precision == "bf16" else objective


def _compiles(ready: Ready, order: Order, device: torch.device, voice: Voice) -> bool:
    """Raises ConfigError where compilation is asked for and cannot be done, and says so where it would only have paid."""
    run = ready.run
    lacking, asked = compiling.missing(device), run.compile in ("on", "graphs")
    if asked and lacking:
        raise ConfigError(
            f"compile={run.compile!r} needs {lacking}, which is not found here; install it, or use compile='off'"
        )
    long = compiling.is_long(ready.model, order.total * run.window, device)
    if run.compile == "auto" and long and lacking:
        voice.say(
            f"steps of this run could be shorter: torch.compile needs {lacking}, which is not found here"
        )
    return asked or (run.compile == "auto" and long and not lacking)


def _compiled(ready: Ready, plain: Learner, order: Order, voice: Voice) -> Learner:
    """With blocks and loss compiled; eagerly where that fails in a run that leaves the choice open."""
    run, device = ready.run, next(ready.model.parameters()).device
    learner = plain._replace(shapes=compiling.Shapes(run.batch, compiling.widths(run.window, run.packing)))
    batch = learner.batch(order.step(0)[0], device)
    objective = compiling.prepare(ready.model, batch, compiled=True, with_graphs=run.compile == "graphs")
    objective = in_precision(run, objective, device)
    try:
        with voice.phase("compiling the model"):
            seconds = compiling.warm_up(ready.model, objective, batch, smoothing=run.label_smoothing)
    except ConfigError as e:
        if run.compile != "auto":
            raise
        voice.say(f"{e}; goes on without")
        return plain._replace(objective=in_precision(run, compiling.prepare(ready.model, batch), device))
    voice.say(f"compiled in {math.ceil(seconds)} s")
    return learner._replace(objective=objective)
