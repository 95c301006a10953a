"""CUDA graphs: on a GPU the kernels of a compiled block, whose shapes repeat, are launched as one (`--compile graphs`).

This has not been run on a GPU yet: the tests that need one are skipped where there is none, and no figure is known.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.tasks import Batch, Objective

OPTIONS: dict[str, bool] = {"triton.cudagraphs": True}  # of torch.compile


def reason_against(device: torch.device) -> str | None:
    """Why there are no CUDA graphs on this device, or None."""
    return (
        None
        if device.type == "cuda"
        else f"compile='graphs' is for GPUs, and this run computes on {device}; use compile='on'"
    )


def on_graphs(objective: Objective) -> Objective:
    """The objective of a model whose blocks are compiled with OPTIONS.

    What a graph returns lies in memory that its next run writes again, and each call of this is such a run. Gradients outlive
    it where a step has several batches: they are added into tensors that are there before the graph, and not handed out by it.
    """

    def act(model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        if torch.is_grad_enabled():
            torch.compiler.cudagraph_mark_step_begin()
            for p in model.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
        return objective(model, batch, smoothing=smoothing)

    return act
