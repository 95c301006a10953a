"""Measures how well a model predicts a text in bits per byte, which compares models of any tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.pack import IGNORED, Window, collate, n_bytes, n_tokens
from veneer.errors import DataError
from veneer.tasks.base.figure import Metric
from veneer.tasks.base.task import Batch, Between, Objective, nothing

BITS = Metric("bpb", "bits per byte")


class Nats(Protocol):
    """The cross-entropy of every label of a batch, in the order of positions: (n,)."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor: ...


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    windows: Sequence[Window],
    objective: Objective,
    *,
    batch: int,
    between: Between = nothing,
) -> float:
    """Returns the bits that the model needs for the learned text of the windows, per byte of it.

    between: called before every batch; its errors end the evaluation. Raises DataError if the windows hold no
    learned byte.
    """
    total = n_bytes(windows)
    if not total:
        raise DataError("the evaluated text has no byte that is learned")
    device = next(model.parameters()).device
    nats = 0.0
    with evaluating(model):
        for at in range(0, len(windows), batch):
            between()
            inputs = {k: v.to(device) for k, v in collate(windows[at : at + batch], 0).items()}
            nats += float(objective(model, inputs)[0])
    return nats / math.log(2) / total


@torch.no_grad()
def nats_by_window(
    model: nn.Module, windows: Sequence[Window], nats: Nats, *, batch: int, between: Between = nothing
) -> Tensor:
    """Returns the nats that the model needs for the learned text of each window: (n,) in float64.

    Windows of similar length share a batch, as padding costs as much as text.
    """
    device = next(model.parameters()).device
    found = torch.zeros(len(windows), dtype=torch.float64)
    order = sorted(range(len(windows)), key=lambda i: n_tokens([windows[i]]))
    with evaluating(model):
        for at in range(0, len(order), batch):
            between()
            some = order[at : at + batch]
            inputs = collate([windows[i] for i in some], 0)
            owner = torch.tensor(some)[(inputs["labels"] != IGNORED).nonzero()[:, 0]]  # window of each label
            each = nats(model, {k: v.to(device) for k, v in inputs.items()})
            found.index_add_(0, owner, each.double().cpu())
    return found
