"""`fit`: from a Run to a folder with an adapter, its metrics, and figures of learning and forgetting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from veneer import disk
from veneer.compress.store import save_quantised
from veneer.data.order.order import Order
from veneer.errors import ConfigError, option
from veneer.files import clean
from veneer.launcher import launched
from veneer.models import machine
from veneer.ops.draws import keyed
from veneer.runs import base_model, divided
from veneer.runs.findings import sampler
from veneer.runs.finish import Begun, end, made_up
from veneer.runs.learner import keeping, learner, precision
from veneer.runs.on_ray import fit as on_ray
from veneer.runs.prepare import Ready, prepare
from veneer.runs.shared import Shared
from veneer.runs.texts import streamed, texts
from veneer.tasks import Task
from veneer.tasks.base.abilities import Writer
from veneer.tasks.base.custom import Loss, with_objective
from veneer.train import group, track
from veneer.train.folder import drift, layout, lock, owner
from veneer.train.folder.result import Result
from veneer.train.loop.loop import Loop
from veneer.train.loop.progress import Voice
from veneer.train.loop.schedule import Pace
from veneer.train.loop.signals import listening
from veneer.train.loop.state import Position
from veneer.train.noise import dropping, noisy
from veneer.train.run import Run
from veneer.train.world import ALONE, World, in_turn


def fit(
    run: Run,
    *,
    progress: bool = True,
    world: World | None = None,
    objective: Loss | None = None,
    engine: Literal["torch", "ray"] = "torch",
    workers: int | None = None,
    max_restarts: int | None = None,
    shared: Shared | None = None,
) -> Result:
    """Trains as `run` says, in the folder run.out, and returns the result.

    progress: prints sentences on stderr, and a bar on a terminal. world: the processes that train this run
    together, each with a share of every batch; those of torchrun unless given. objective: loss(model, batch)
    in place of the task's, which returns the sum of the losses and the number of labels; figures stay the
    task's. engine: "ray" trains in workers of Ray Train; see `fit_on_ray` for workers and max_restarts.
    shared: a `veneer.runs.shared.Shared` with texts and base of earlier runs of this process; Ray's workers
    read their own.
    Everything is checked before anything is written. Raises the errors of veneer.errors, and those
    of veneer.train.errors for trainings that end early, all saved.

        veneer.fit(veneer.Run(model="./llama", data="notes.jsonl", method="dora", options={"rank": 16}))
    """
    if on_ray.chosen(engine, workers, max_restarts, world):
        return on_ray.fit_on_ray(run, workers, max_restarts, progress=progress, objective=objective)
    if launched().restarts:
        run = replace(run, resume=True)
    with disk.written(Path(run.out)), ExitStack() as stack:
        world = stack.enter_context(group.joined(run.device)) if world is None else world
        voice = Voice(progress and world.first)
        ready = look(run, voice, stack, world, shared)
        if objective is not None:
            ready = _with(ready, objective, voice)
        begun = begin(ready, voice, stack, world)
        if isinstance(begun, Result):
            return begun
        _unsettle(begun.ready.model, run, stack)
        loop = loop_of(begun)  # a signal ends its compilation at once
        wish = stack.enter_context(listening(alone=world.size == 1))
        return end(begun, loop, loop.run(wish), wish)


def fit_until(
    run: Run, step: int, *, progress: bool = False, shared: Shared | None = None, world: World = ALONE
) -> Result | Position:
    """Trains as `fit` up to a step and saves there; returns the result once the training has ended.

    run: with resume, so that the next call goes on; shared: with other runs of this process. Raises the
    errors of `fit`.
    """
    voice = Voice(progress and world.first)
    with disk.written(Path(run.out)), ExitStack() as stack:
        begun = begin(look(run, voice, stack, world, shared), voice, stack, world)
        if isinstance(begun, Result):
            return begun
        _unsettle(begun.ready.model, run, stack)
        loop = loop_of(begun, shared)
        wish = stack.enter_context(listening(alone=world.size == 1))
        loop.until = step
        position = loop.run(wish)
        return position if loop.paused() else end(begun, loop, position, wish)


def _unsettle(model: nn.Module, run: Run, stack: ExitStack) -> None:
    """Adds noise and dropout of the run's training, until the stack closes. Raises ConfigError."""
    if run.neftune:
        stack.callback(noisy(model, run.neftune).remove)
    if run.attention_dropout:
        stack.callback(dropping(model, run.attention_dropout))


def _with(ready: Ready, objective: Loss, voice: Voice) -> Ready:
    """Returns the run with a loss of the user's own, recorded by its name."""
    if ready.run.label_smoothing:
        smoothing = option("label_smoothing")
        raise ConfigError(f"{smoothing} has no effect on a loss of your own; leave it out")
    name = getattr(objective, "__qualname__", type(objective).__name__)
    voice.say(f"the loss is {name}, in place of that of task {ready.run.task!r}")
    config = {**ready.config, "objective": name, "notes": list(voice.said)}
    task, device = with_objective(ready.task, objective), next(ready.model.parameters()).device
    trial = task.collate([task.trial(ready.texts["train"].examples)])
    with torch.no_grad():  # what it returns is checked before anything is written
        task.loss(ready.model, {k: v.to(device) for k, v in trial.items()})
    return ready._replace(task=task, config=config)


def look(
    run: Run, voice: Voice, stack: ExitStack, world: World = ALONE, shared: Shared | None = None
) -> Ready:
    """Reads and checks everything; writes nothing but the lock of a run that has begun."""
    out = Path(run.out)
    track.check_installed(run.track)
    device, held = machine.device(run.device), False
    if world.first:
        layout.check_free(out, run.resume)
        if held := (out / layout.CONFIG).exists():
            stack.enter_context(lock.held(out))
    stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
    return prepare(run, device, voice, shared=shared, world=world)._replace(held=held)


def begin(ready: Ready, voice: Voice, stack: ExitStack, world: World = ALONE) -> Begun | Result:
    """Creates or reopens the run's folder; returns the result of a finished run."""
    out, names = Path(ready.run.out), ready.run.track if world.first else ()
    world.barrier()
    if world.first and (finished := _open(out, ready, voice, stack)):
        return finished
    world.barrier()
    if not world.first and (out / layout.RESULTS).exists():
        return Result.read(out)
    feed = stack.enter_context(track.Feed(names, out, ready.config, voice))
    return Begun(ready, out, voice, feed, world)


def _open(out: Path, ready: Ready, voice: Voice, stack: ExitStack) -> Result | None:
    if not ready.held:
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock.held(out))
        layout.check_free(out, ready.run.resume)  # again: another may have begun here since `look`
    clean(out)
    if not (out / layout.CONFIG).exists():
        _write_settings(out, ready)
        return None
    _check_same(out, ready, voice)
    if not (out / layout.RESULTS).exists():
        return None
    voice.say(f"{out} is finished already; its result is returned unchanged")
    made_up(ready, out, voice)
    return Result.read(out)


def _write_settings(out: Path, ready: Ready) -> None:
    """Writes the files of a beginning; config.json, which makes the folder a run, comes last."""
    if base_model.start_of(ready.run):
        save_quantised(ready.model, base_model.own_base(ready.run), ready.run.model)
    left_out = {part: t.left_out._asdict() for part, t in ready.texts.items() if any(t.left_out)}
    if left_out:
        layout.put(out / layout.LEFT_OUT, left_out)
    layout.put(out / layout.CONFIG, owner.named(ready.config))


def _check_same(out: Path, ready: Ready, voice: Voice) -> None:
    allowed = drift.check_drift(out, ready.config, ready.run.allow)
    for sentence in allowed:
        voice.say(f"differs from the beginning of the run, as allowed: {sentence}")
    if allowed:
        (out / layout.RESULTS).unlink(missing_ok=True)
        before = drift.record(out)
        layout.put(out / layout.CONFIG, owner.renewed({**ready.config, "allowed": allowed}, before))


def loop_of(begun: Begun, shared: Shared | None = None) -> Loop:
    """Returns the training, at its beginning or at the newest checkpoint."""
    ready, run, task = begun.ready, begun.ready.run, begun.ready.task
    draws = "dropout" if begun.world.first else f"dropout of process {begun.world.rank}"
    torch.manual_seed(int(torch.randint(1 << 62, (), generator=keyed(run.seed, draws))))
    laid, pace = lay_out(run, task, ready.texts["train"].examples)
    order = streamed.order(run, task, begun.voice) if run.stream else laid
    if run.shard:
        divided.divide(ready, begun.world, begun.voice)
    plain = learner(ready, laid, begun.voice, begun.world)
    with in_turn(begun.world):  # one process makes the cache's files
        own = keeping(ready, plain, laid, begun.voice)
    sample = None
    if run.samples:
        assert isinstance(task, Writer)  # checked with the settings
        sample = sampler(ready.model, task, ready.texts["valid"].examples, run)
    loop = Loop(
        own,
        order,
        texts.evaluated(ready.texts, run, task),
        pace,
        folder=begun.out,
        voice=begun.voice,
        feed=begun.feed,
        precision=precision(run, next(ready.model.parameters()).device),
        chooses=run.chooses,
        sample=sample,
        opening=shared.opening(run) if shared else None,
    )
    loop.begin(run.resume)
    return loop


def lay_out(run: Run, task: Task, examples: Sequence[Any]) -> tuple[Order, Pace]:
    """Returns the examples of each step, and the steps at which to evaluate and save."""
    total = max(1, round((run.epochs or 1.0) * len(examples)))
    if run.steps:
        total = run.steps * run.batch * run.accumulate
    sizes = None if run.packing else [task.size(e) for e in examples]
    order = Order(examples, run.batch, run.accumulate, total=total, seed=run.seed, sizes=sizes)
    every = run.eval_every or max(1, order.steps // 5)
    warmup, save_every = run.rising(order.steps), run.save_every or every
    lr = run.lr or math.nan
    return order, Pace(order.steps, lr, run.schedule, warmup, every, save_every, run.keep, run.patience)
