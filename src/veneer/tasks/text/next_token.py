"""The loss of the next token, through the model's head on labelled positions alone, a chunk at a time."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapt.attached import layers
from veneer.adapt.calls import check_called
from veneer.data.pack import IGNORED
from veneer.ops.chunked import CHUNK, Kernel, blocked, cross_entropy
from veneer.ops.matrix.linalg import precise
from veneer.tasks.base.shape import Counted, Shape
from veneer.tasks.base.task import Batch
from veneer.tasks.text.head import Head, cut, difference

PROBED = 64  # positions at which a head is compared with its model
CHECKED = WeakKeyDictionary[nn.Module, "Head | None"]

_heads: CHECKED = WeakKeyDictionary()  # None for a model whose head failed the check


def inputs(batch: Batch) -> dict[str, Any]:
    """Returns the arguments of the model's forward."""
    return {**{k: v for k, v in batch.items() if k != "labels"}, "use_cache": False}


def loss(
    model: nn.Module,
    batch: Batch,
    *,
    chunked: bool = True,
    smoothing: float = 0.0,
    kernel: Kernel | None = None,
) -> tuple[Tensor, int]:
    """Returns the sum of the losses in nats, and the number of labels.

    batch: input_ids (b, t); labels (b, t), already shifted: labels[i] is the token after input_ids[i];
    position_ids (b, t), restarting with each document, if a row holds several. It has no attention mask:
    padding comes last. chunked: runs the head on labelled positions only, a chunk at a time, so that the
    logits never exist as a whole. smoothing, kernel: see ops.chunked.
    """
    labels = batch["labels"]
    learned = labels != IGNORED
    given = inputs(batch)
    head = head_of(model, given, learned) if chunked else None
    targets = labels[learned]
    if head is not None:
        features = head.features(given)[learned]
        return cross_entropy(
            features, targets, head.logits, head.parameters(), smoothing=smoothing, kernel=kernel
        ), len(targets)
    logits = precise(model(**given).logits[learned])
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing), len(targets)


def losses(model: nn.Module, batch: Batch, rows: Sequence[int], smoothing: Sequence[float]) -> list[Tensor]:
    """Returns the sums of the first rows[0] rows with smoothing[0], of the next rows[1], .., from one
    pass."""
    labels = batch["labels"]
    learned = labels != IGNORED
    given = inputs(batch)
    head = head_of(model, given, learned)
    read = head.features(given) if head else model(**given).logits
    found = []
    for x, y, some, spread in zip(
        *(t.split(list(rows)) for t in (read, labels, learned)), smoothing, strict=True
    ):
        if head:
            found.append(cross_entropy(x[some], y[some], head.logits, head.parameters(), smoothing=spread))
        else:
            found.append(F.cross_entropy(precise(x[some]), y[some], reduction="sum", label_smoothing=spread))
    return found


@torch.no_grad()
def nats(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the cross-entropy of every label of a batch, in the order of positions: (n,)."""
    learned = batch["labels"] != IGNORED
    given = inputs(batch)
    head = head_of(model, given, learned)
    read, logits = (head.features(given), head.logits) if head else (model(**given).logits, nn.Identity())
    pieces = zip(read[learned].split(CHUNK), batch["labels"][learned].split(CHUNK), strict=True)
    return torch.cat([F.cross_entropy(precise(logits(x)), labels, reduction="none") for x, labels in pieces])


def head_of(model: nn.Module, given: dict[str, Any], learned: Tensor) -> Head | None:
    """Returns the model's head if it makes the model's own logits, else None with a warning.

    The check runs once, on the first batch.
    """
    if model not in _heads:
        if torch.compiler.is_compiling():
            return None
        _heads[model] = _checked(model, given, learned)
    return _heads[model]


def _checked(model: nn.Module, given: dict[str, Any], learned: Tensor) -> Head | None:
    head = cut(model)
    if head is None:
        return None
    places = learned & (learned.flatten().cumsum(0).view_as(learned) <= PROBED)
    error = difference(model, head, given, places)
    if any(d.called for d in layers(model)):  # a compiled body records no calls
        check_called(model)  # the hook that does it sees calls of the whole model only
    dtype = next((p.dtype for p in head.layer.parameters()), torch.float32)
    if error <= 64 * torch.finfo(dtype).eps:
        return head
    warnings.warn(
        f"{type(model).__name__}: output layer and configuration do not give its logits (relative difference"
        f" {error:.1g}); the loss is computed from all logits at once: exact, but with more memory",
        stacklevel=3,
    )
    return None


def outline(model: nn.Module, shape: Shape, device: torch.device, counted: Counted) -> Tensor:
    """Returns the loss of a batch of this shape, whose tokens nothing looks at."""
    ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.int64, device=device)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if shape.packed:
        mask = (shape.rows, 1, shape.tokens, shape.tokens)
        given["attention_mask"] = torch.ones(mask, dtype=torch.bool, device=device)
    targets = ids.new_zeros(shape.labels)
    head = cut(model)
    if head is None:
        logits = model(**given).logits.flatten(0, 1)[: shape.labels].float()
        return F.cross_entropy(logits, targets, reduction="sum")
    features = head.features(given).flatten(0, 1).index_select(0, targets)
    # From the second one on, chunks and the rounds in them meet the numbers of the one before, and are alike.
    kernel, parameters = functools.partial(blocked, rounds=2), head.parameters()
    with counted(shape.labels / min(2 * CHUNK, shape.labels)):
        return cross_entropy(features, targets, head.logits, parameters, kernel=kernel, chunks=2)
