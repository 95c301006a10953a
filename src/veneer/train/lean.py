"""How torch.compile makes the graphs of a model's blocks: what they keep for the backward, and which may be used again."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.head import cut
from veneer.tasks import Batch, Objective

# Share of a block's activations that is kept for the backward; the compiler computes the rest again, what costs least first.
# In a Llama's block four fifths spare norms and activation functions alone; 0.7 computes attention again too, and from 0.6 on
# products with frozen weights, a sixth of them at 0.35.
MOST, FEWER = 0.8, 0.35
# A product again costs as many operations for a byte less as its input is wide, and a processor does four to six times as many
# in bfloat16 as in float32. Up to this width, in bfloat16 on a CPU, fewer are kept: a sixteenth of the time for a quarter of the memory.
NARROW = 768


def share(model: nn.Module) -> float:
    """Share of the blocks' activations that a compiled training of this model keeps."""
    head = cut(model)
    weight = None if head is None else getattr(head.layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return MOST
    return FEWER if weight.shape[-1] <= NARROW else MOST


def lean(objective: Objective, kept: float) -> Objective:
    """The objective, whose blocks are compiled to keep that share of their activations, and with a look at their hooks.

    Without that look the graph of a block whose layers are not adapted would serve for blocks whose layers are. Graphs are
    cached between runs though they hold derivatives of our own, which their keys hold too.
    """

    def act(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        import torch._dynamo.config as tracing
        import torch._functorch.config as derivatives

        with ExitStack() as settings:
            settings.enter_context(_set(tracing, skip_nnmodule_hook_guards=False))
            settings.enter_context(_set(derivatives, activation_memory_budget=kept))
            if hasattr(derivatives, CACHED):  # not in every version
                settings.enter_context(_set(derivatives, **{CACHED: True}))
            return objective(model, batch)

    return act


CACHED = "autograd_cache_allow_custom_autograd_functions"


def _set(config: Any, **values: object) -> AbstractContextManager[Any]:
    found: AbstractContextManager[Any] = config.patch(**values)
    return found
