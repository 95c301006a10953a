"""Draws the random parts of examples, such as noise and hidden tokens, alike in all processes.

One process draws them within its loss. Several draw those of the whole step first, each of them all, and
then share the examples: their number changes no draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.tasks import Task
from veneer.tasks.base.abilities import Draws
from veneer.train.world import World

STATE = "rng.task"  # of a checkpoint's tensors


class Drawing:
    """The random numbers of the task, equal in all processes and apart from those of their dropout."""

    def __init__(self, task: Task, world: World) -> None:
        self.task = task if isinstance(task, Draws) and world.size > 1 else None
        self.drawn_from = torch.get_rng_state()
        if self.task is not None:
            world.share([self.drawn_from])
            if world.first:  # its dropout must not repeat these numbers
                torch.manual_seed(int(torch.randint(1 << 62, ())))

    def draw(self, micro: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
        """Returns the micro-batches of a step with their random parts, or unchanged."""
        if self.task is None:
            return micro
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.drawn_from)
            found = [self.task.drawn(some) if some else some for some in micro]
            self.drawn_from = torch.get_rng_state()
        return found

    def state(self) -> dict[str, Tensor]:
        """Returns the state for a checkpoint."""
        return {} if self.task is None else {STATE: self.drawn_from}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Continues from a checkpoint of any number of processes."""
        if self.task is not None:
            self.drawn_from = saved.get(STATE, saved["rng"]).clone()
