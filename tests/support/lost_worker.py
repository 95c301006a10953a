"""A loss that kills its process once: the second of two, within a step of the training."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import torch

from veneer.launcher import launched
from veneer.tasks.text import next_token


@dataclass
class Killing:
    """The task's own loss. at: the call with a gradient in which process 1 ends; marker: made before."""

    at: int
    marker: str
    calls: int = 0

    def __call__(self, model: Any, batch: Any) -> Any:
        self.calls += torch.is_grad_enabled()
        if launched().rank == 1 and self.calls == self.at and not os.path.exists(self.marker):
            with open(self.marker, "w") as f:
                f.write("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        return next_token.loss(model, batch)
