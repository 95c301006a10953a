"""A task with a loss of the user's own in place of its loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.ops.chunked import Kernel
from veneer.tasks.base.task import Batch, Objective, Task

Own = TypeVar("Own", bound=Task)
Loss = Callable[[nn.Module, Batch], "tuple[Tensor, int]"]


def with_objective(task: Own, function: Loss) -> Own:
    """Returns the task with `function` as its loss; rows, batches and figures stay the task's.

    function(model, batch) returns the sum of the losses of a batch, as a tensor with a gradient, and the
    number of labels that it is over.
    """
    found = copy.copy(task)

    def loss(model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        made: Any = function(model, batch)
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Tensor)):
            raise ConfigError(
                f"objective: must return the sum of the losses and their number, got a {type(made).__name__}"
            )
        if made[0].ndim:
            raise ConfigError(
                f"objective: the sum of the losses must be one number, got {tuple(made[0].shape)}"
            )
        return made[0], int(made[1])

    def objective(kernel: Kernel) -> Objective:
        return loss

    vars(found).update(loss=loss, objective=objective)
    return found
