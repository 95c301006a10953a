"""Causal language modelling: the cross-entropy of the next token, over the positions that carry a label."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapt.attached import layers
from veneer.adapt.calls import check_called
from veneer.ops.chunked import CHUNK, Kernel, cross_entropy
from veneer.ops.matrix.linalg import precise
from veneer.tasks import Batch
from veneer.tasks.head import Head, cut, difference

IGNORED = -100
PROBED = 64  # positions at which a head is compared with its model

_heads: WeakKeyDictionary[nn.Module, Head | None] = (
    WeakKeyDictionary()
)  # checked ones; None where the check failed


def loss(
    model: nn.Module,
    batch: Batch,
    *,
    chunked: bool = True,
    smoothing: float = 0.0,
    kernel: Kernel | None = None,
) -> tuple[Tensor, int]:
    """Sum in nats, and the number of labels.

    batch: input_ids (b, t), labels (b, t) already shifted: labels[i] is the token after input_ids[i]; position_ids
    (b, t), beginning anew with each document, where a row holds several. There is no attention mask: padding comes last.
    chunked: the head runs on labelled positions only, a chunk at a time, so that the logits never exist as a whole;
    smoothing and kernel are those of ops.chunked.
    """
    labels = batch["labels"]
    learned = labels != IGNORED
    inputs = {**{k: v for k, v in batch.items() if k != "labels"}, "use_cache": False}
    head = head_of(model, inputs, learned) if chunked else None
    targets = labels[learned]
    if head is not None:
        features = head.features(inputs)[learned]
        return cross_entropy(
            features, targets, head.logits, head.parameters(), smoothing=smoothing, kernel=kernel
        ), len(targets)
    logits = precise(model(**inputs).logits[learned])
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing), len(targets)


def losses(model: nn.Module, batch: Batch, rows: Sequence[int], smoothing: Sequence[float]) -> list[Tensor]:
    """As `loss`, the sums of the first rows[0] rows with smoothing[0], of the next rows[1], .., from one pass through the body."""
    labels = batch["labels"]
    learned = labels != IGNORED
    inputs = {**{k: v for k, v in batch.items() if k != "labels"}, "use_cache": False}
    head = head_of(model, inputs, learned)
    read = head.features(inputs) if head else model(**inputs).logits
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
    """The cross-entropy of every label alone, in the order of their positions: (n,), for a batch as `loss` takes it."""
    learned = batch["labels"] != IGNORED
    inputs = {**{k: v for k, v in batch.items() if k != "labels"}, "use_cache": False}
    head = head_of(model, inputs, learned)
    read, logits = (head.features(inputs), head.logits) if head else (model(**inputs).logits, nn.Identity())
    pieces = zip(read[learned].split(CHUNK), batch["labels"][learned].split(CHUNK), strict=True)
    return torch.cat([F.cross_entropy(precise(logits(x)), labels, reduction="none") for x, labels in pieces])


def head_of(model: nn.Module, inputs: Batch | dict[str, object], learned: Tensor) -> Head | None:
    """The model's head if it makes the model's own logits, which is checked once, on the first batch; else None.

    Warns, once, where it does not.
    """
    if model not in _heads:
        if torch.compiler.is_compiling():
            return None
        _heads[model] = _checked(model, inputs, learned)
    return _heads[model]


def _checked(model: nn.Module, inputs: Batch | dict[str, object], learned: Tensor) -> Head | None:
    head = cut(model)
    if head is None:
        return None
    places = learned & (learned.flatten().cumsum(0).view_as(learned) <= PROBED)
    error = difference(model, head, inputs, places)
    if any(d.called for d in layers(model)):  # none is where the body has been compiled already
        check_called(model)  # the hook that does it sees calls of the whole model only
    dtype = next((p.dtype for p in head.layer.parameters()), torch.float32)
    if error <= 64 * torch.finfo(dtype).eps:
        return head
    warnings.warn(
        f"{type(model).__name__} does more to its logits than its output layer and configuration say (they differ by {error:.1g} of the"
        f" largest); its loss is computed from all logits at once, which is exact but takes more memory",
        stacklevel=3,
    )
    return None
