"""CUDA graphs: launches the kernels of a compiled block as one, as shapes repeat (`--compile graphs`).

Not yet run on a GPU: its tests are skipped without one, and no figure is known.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.tasks import Batch, Objective

OPTIONS: dict[str, bool] = {"triton.cudagraphs": True}  # of torch.compile


def reason_against(device: torch.device) -> str | None:
    """Returns the reason against CUDA graphs on this device, or None."""
    on_gpu = device.type == "cuda"
    return (
        None
        if on_gpu
        else f"compile='graphs' needs a GPU, and this run computes on {device}; use compile='on'"
    )


def on_graphs(objective: Objective) -> Objective:
    """Returns the objective of a model whose blocks are compiled with OPTIONS.

    A graph's next run overwrites the memory of its results, and each call here is a run. Gradients must
    outlive it if a step has several batches: they are added to tensors made before the graph.
    """

    def act(model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        if torch.is_grad_enabled():
            torch.compiler.cudagraph_mark_step_begin()
            for p in model.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
        return objective(model, batch, smoothing=smoothing)

    return act
