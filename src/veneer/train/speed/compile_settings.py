"""Settings of torch.compile for a model's blocks: activations kept for the backward, and graphs to reuse."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn

from veneer.tasks import Batch, Objective

# Share of a block's activations kept for the backward; the compiler recomputes the rest, the cheapest first.
# In a Llama's block four fifths spare norms and activation functions alone. 0.7 recomputes attention too, 0.6
# and less products with frozen weights: at 0.6 a step of a Llama of width 512 takes 5 % more, at 0.35 25 %
# more for a quarter less memory.
KEPT = 0.8
CACHED = "autograd_cache_allow_custom_autograd_functions"


def lean(objective: Objective) -> Objective:
    """Returns the objective, compiled to keep little (see KEPT) and with guards on hooks.

    Without guards the graph of a block without adapters would serve for adapted ones too. Graphs are cached
    between runs although they hold derivatives of our own, as their keys hold these too.
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
