"""A run whose base is divided among processes, and its adapter on a whole base again."""

from __future__ import annotations

import torch

from veneer.runs import base_model, trained
from veneer.runs.prepare import Ready
from veneer.runs.starts import calibration
from veneer.sites.own import is_own
from veneer.tasks.base.heads import heads
from veneer.train import sharding
from veneer.train.loop import state
from veneer.train.loop.progress import Voice
from veneer.train.world import World
from veneer.units import size


def divide(ready: Ready, world: World, voice: Voice) -> None:
    """Divides the base's blocks, in place. Raises ConfigError."""
    device = torch.device(ready.run.device)
    held = sharding.shard(ready.model, ready.task, ready.parts, world, device)
    voice.say(f"the base is divided among {world.size} processes; this one holds {size(held)}")


@torch.no_grad()
def whole(ready: Ready) -> Ready:
    """Returns the run with its adapter on a base that is loaded anew, on the CPU; other processes wait."""
    run, task, cpu = ready.run, ready.task, torch.device("cpu")
    model, _ = base_model.base(run, task, run.base_dtype, cpu, Voice(False))
    stats = calibration.unseen(model, run) if calibration.needed(run) else None
    aside = trained.Aside(heads(model) if task.NEW_HEAD else [], task.unused(model))
    parts = trained.open_parameters(model, run, stats, aside)
    held = dict([*ready.model.named_parameters(), *ready.model.named_buffers()])
    learned = {part.name for part in parts}
    state.resize(model, parts, {part.name: part.parameter.shape for part in ready.parts})
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if is_own(name) or name in learned:
            t.copy_(held[name])
    return ready._replace(model=model.eval(), parts=parts)
