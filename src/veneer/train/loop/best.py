"""Restores the parameters of the best step of a training, or the running means of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from veneer.errors import first_few, option
from veneer.tasks import Figure
from veneer.train.errors import Diverged
from veneer.train.folder import checkpoint, owner
from veneer.train.loop import state
from veneer.train.world import World

if TYPE_CHECKING:
    from veneer.train.loop.loop import Loop


def shared(figures: Mapping[str, list[Figure]], world: World) -> dict[str, list[Figure]]:
    """Returns the figures with the first process' values: all processes choose one best step."""
    values = torch.tensor([f.value for some in figures.values() for f in some], dtype=torch.float64)
    world.share([values])
    own = iter(values.tolist())
    return {text: [f._replace(value=next(own)) for f in some] for text, some in figures.items()}


def check_finite(loop: Loop, figures: Mapping[str, Sequence[Figure]]) -> None:
    """Raises Diverged if the metric of a text is infinite or NaN, which no file of a run can hold."""
    for text, some in figures.items():
        if not math.isfinite(some[0].value):
            where = f"{some[0].metric.words} of {text} text is {some[0].value} at step {loop.position.step}"
            raise Diverged(f"{where}; {_way_out(loop)}", loop.folder)


def check_parameters(loop: Loop) -> None:
    """Raises Diverged if a trained parameter or its running mean is infinite or NaN."""
    mean = {} if loop.learner.mean is None else loop.learner.mean.tensors()
    trained = {**{p.name: p.parameter for p in loop.learner.parts}, **mean}
    if odd := [n for n, t in trained.items() if not bool(torch.isfinite(t).all())]:
        step = loop.position.step
        where = f"{len(odd)} trained parameters are infinite or NaN after step {step}: {first_few(odd, 3)}"
        raise Diverged(f"{where}; {_way_out(loop)}", loop.folder)


def _way_out(loop: Loop) -> str:
    """Returns the state to go on from, and what to change."""
    if loop.position.step == 0:
        return f"the base cannot compute this text; check it, or use {option('precision', 'fp32')}"
    kept = checkpoint.found(loop.checkpoints)
    resume, allow = option("resume", True), option("allow", "config")
    from_there = f"{resume} goes on from {kept[-1].name if kept else 'step 0'}"
    return f"{from_there}; lower lr (its peak was {loop.pace.lr:g}), with {allow}"


def restore(loop: Loop) -> None:
    """Leaves the model with the parameters that were measured at the best step."""
    p = loop.position
    if p.best_step not in (None, p.step):
        _from_checkpoint(loop)
    if loop.learner.mean is not None:
        loop.learner.mean.take()


def _from_checkpoint(loop: Loop) -> None:
    p = loop.position
    path = loop.checkpoints / f"step-{p.best_step:06d}"
    problem = checkpoint.damage(path)
    if not problem:
        found = checkpoint.load(path)
        owner.check(path, found.meta, loop.owners)
        state.put_back(loop.learner, found)
        return
    loop.voice.say(
        f"the best checkpoint, of step {p.best_step}, is damaged ({problem}); the weights of the last"
        " step are used"
    )
    figures = loop.measure([n for n in loop.texts if n != "test"])
    check_finite(loop, figures)
    p.best_step = p.step
    p.keep("best", figures)
