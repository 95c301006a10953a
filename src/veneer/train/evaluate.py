"""How well a model predicts a text: bits per byte, which compares models with different tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from veneer.data.pack import Window, collate, n_bytes
from veneer.errors import DataError
from veneer.tasks import Objective


def sample(windows: Sequence[Window], at_most: int) -> list[Window]:
    """At most that many windows, evenly spaced; all of them for 0."""
    n = len(windows)
    return list(windows) if not 0 < at_most < n else [windows[i * n // at_most] for i in range(at_most)]


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    windows: Sequence[Window],
    objective: Objective,
    *,
    batch: int,
    between: Callable[[], None] = lambda: None,
) -> float:
    """Bits that the model needs for the learned text of the windows, per byte of it; in eval mode, which is put back.

    between: called before every batch; what it raises ends the evaluation. Raises DataError if there is no byte.
    """
    total = n_bytes(windows)
    if not total:
        raise DataError("the evaluated text has no byte that is learned")
    device = next(model.parameters()).device
    training = model.training
    nats = 0.0
    model.eval()
    try:
        for at in range(0, len(windows), batch):
            between()
            inputs = {k: v.to(device) for k, v in collate(windows[at : at + batch], 0).items()}
            nats += float(objective(model, inputs)[0])
    finally:
        model.train(training)
    return nats / math.log(2) / total
