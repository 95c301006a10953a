"""Writes the checkpoint of a training, unless a trained parameter is NaN or infinite."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.train.folder import checkpoint
from veneer.train.loop import alike, best, state

if TYPE_CHECKING:
    from veneer.train.loop.loop import Loop


def save(loop: Loop) -> None:
    """Writes a checkpoint of the current step, which all processes must call.

    Raises Diverged for a parameter that is NaN or infinite, Unlike if the processes hold different ones, and
    NotSaved for a full disk.
    """
    p = loop.position
    best.check_parameters(loop)
    tensors = {**state.tensors(loop.learner), **loop.order.state(), **loop.drawing.state()}
    alike.check(loop, tensors)
    tensors |= state.dealt(loop.learner)
    if loop.world.first:
        loop.checkpoints.mkdir(parents=True, exist_ok=True)
        own = {"strides": state.strides(tensors), **({"owner": loop.owners[0]} if loop.owners else {})}
        checkpoint.save(loop.checkpoints, p.step, tensors, {**p.as_meta(loop.metrics.sync()), **own})
        checkpoint.prune(loop.checkpoints, loop.pace.keep, {p.best_step or 0})
    loop.world.barrier()
