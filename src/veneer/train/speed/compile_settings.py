"""How torch.compile makes the graphs of a model's blocks: what they keep for the backward, and which may be used again."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn

from veneer.tasks import Batch, Objective

# Share of a block's activations that is kept for the backward; the compiler computes the rest again, what costs least first.
# In a Llama's block four fifths spare norms and activation functions alone. 0.7 computes attention again too, and from 0.6 on
# products with frozen weights: at 0.6 a step of a Llama of width 512 takes 5 % more, at 0.35, a quarter of the memory less, 25 %.
KEPT = 0.8
CACHED = "autograd_cache_allow_custom_autograd_functions"


def lean(objective: Objective) -> Objective:
    """The objective, whose blocks are compiled to keep little (see KEPT), and with a look at their hooks.

    Without that look the graph of a block whose layers are not adapted would serve for blocks whose layers are. Graphs are
    cached between runs though they hold derivatives of our own, which their keys hold too.
    """

    def act(model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        import torch._dynamo.config as tracing
        import torch._functorch.config as derivatives

        with ExitStack() as settings:
            settings.enter_context(_set(tracing, skip_nnmodule_hook_guards=False))
            settings.enter_context(_set(derivatives, activation_memory_budget=KEPT))
            if hasattr(derivatives, CACHED):  # not in every version
                settings.enter_context(_set(derivatives, **{CACHED: True}))
            return objective(model, batch, smoothing=smoothing)

    return act


def _set(config: Any, **values: object) -> AbstractContextManager[Any]:
    found: AbstractContextManager[Any] = config.patch(**values)
    return found
