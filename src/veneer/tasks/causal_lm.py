"""Causal language modelling: the cross-entropy of the next token, over the positions that carry a label."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from veneer.ops.linalg import precise
from veneer.tasks import Batch

IGNORED = -100


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum in nats, and the number of labels.

    batch: input_ids (b, t), labels (b, t) already shifted: labels[i] is the token after input_ids[i]; position_ids
    (b, t), beginning anew with each document, where a row holds several. There is no attention mask: padding comes last.
    """
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = precise(model(**inputs, use_cache=False).logits)  # (b, t, vocabulary)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, int((labels != IGNORED).sum())
