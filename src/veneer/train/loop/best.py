"""Restores the parameters of the best step of a training, or the running means of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from veneer.tasks import Figure
from veneer.train.errors import Diverged
from veneer.train.folder import checkpoint, owner
from veneer.train.loop import state

if TYPE_CHECKING:
    from veneer.train.loop.loop import Loop


def check_finite(loop: Loop, figures: Mapping[str, Sequence[Figure]]) -> None:
    """Raises Diverged if the metric of a text is infinite or NaN, which no file of a run can hold."""
    for text, some in figures.items():
        if not math.isfinite(some[0].value):
            where = f"{some[0].metric.words} of {text} text is {some[0].value} at step {loop.position.step}"
            raise Diverged(f"{where}; lower lr (its peak was {loop.pace.lr:g})", loop.folder)


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
    p.best_step = p.step
    p.keep("best", loop.measure([n for n in loop.texts if n != "test"]))
