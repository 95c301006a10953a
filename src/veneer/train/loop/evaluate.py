"""How well a model predicts a text: bits per byte, which compares models with different tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from veneer.data.pack import IGNORED, Window, collate, n_bytes, n_tokens
from veneer.errors import DataError
from veneer.tasks import Objective, causal_lm

T = TypeVar("T")


def sample(every: Sequence[T], at_most: int) -> list[T]:
    """At most that many windows, or rows, evenly spaced; all of them for 0."""
    n = len(every)
    return list(every) if not 0 < at_most < n else [every[i * n // at_most] for i in range(at_most)]


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
    nats = 0.0
    with _evaluating(model):
        for at in range(0, len(windows), batch):
            between()
            inputs = {k: v.to(device) for k, v in collate(windows[at : at + batch], 0).items()}
            nats += float(objective(model, inputs)[0])
    return nats / math.log(2) / total


def nats_by_window(
    model: nn.Module, windows: Sequence[Window], *, batch: int, between: Callable[[], None] = lambda: None
) -> Tensor:
    """Nats that the model needs for the learned text of each window: (n,) in float64; in eval mode, which is put back.

    Windows of like length are read together, as padding costs as much as text.
    """
    device = next(model.parameters()).device
    found = torch.zeros(len(windows), dtype=torch.float64)
    order = sorted(range(len(windows)), key=lambda i: n_tokens([windows[i]]))
    with _evaluating(model):
        for at in range(0, len(order), batch):
            between()
            some = order[at : at + batch]
            inputs = collate([windows[i] for i in some], 0)
            owner = torch.tensor(some)[
                (inputs["labels"] != IGNORED).nonzero()[:, 0]
            ]  # the window of every label
            nats = causal_lm.nats(model, {k: v.to(device) for k, v in inputs.items()})
            found.index_add_(0, owner, nats.double().cpu())
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
