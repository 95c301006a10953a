"""Log-probabilities of answers under the model, and under the base: the same model with its adapters off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.adapt.attached import active
from veneer.adapt.switch import using
from veneer.data.pack import IGNORED
from veneer.ops.chunked import Kernel, cross_entropy
from veneer.ops.matrix.linalg import precise
from veneer.tasks.base.task import Batch
from veneer.tasks.text.head import Head
from veneer.tasks.text.next_token import head_of

CHUNK = 64  # positions whose two distributions exist at a time


class Scores(NamedTuple):
    """policy, reference (n,): log-probability of every answer, in nats; tokens (n,): its learned tokens.

    reference is None for objectives without one.
    """

    policy: Tensor
    tokens: Tensor
    reference: Tensor | None = None

    @property
    def gained(self) -> Tensor:
        """Returns log pi(y|x) - log r(y|x) of every answer (n,)."""
        assert self.reference is not None
        return self.policy - self.reference

    @property
    def means(self) -> Tensor:
        """Returns the mean log-probability of a token of every answer (n,)."""
        return self.policy / self.tokens


def scores(model: nn.Module, batch: Batch, *, reference: bool, kernel: Kernel | None = None) -> Scores:
    """Returns the scores of the answers of a batch: input_ids, labels (n, t), as of `next_token.loss`.

    The reference is a second pass of the same batch without gradients, through the same weights. Dropout is
    off in both.
    """
    quieten(model)
    tokens = (batch["labels"] != IGNORED).sum(1)
    policy = logps(model, batch, kernel)
    if not reference:
        return Scores(policy, tokens)
    with base(model):
        return Scores(policy, tokens, logps(model, batch, kernel))


@contextmanager
def base(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes as the base, without gradients."""
    with torch.no_grad(), using(model):
        yield


def quieten(model: nn.Module) -> None:
    """Turns dropout off, in the backward too: blocks that are recomputed there stay in training mode."""
    for module in model.modules():
        module.training = module.training and bool(getattr(module, "gradient_checkpointing", False))


def logps(model: nn.Module, batch: Batch, kernel: Kernel | None = None) -> Tensor:
    """Returns the sum of the log-probabilities of the labels of each row (n,), in at least float32."""
    labels, learned = batch["labels"], batch["labels"] != IGNORED
    given = {"input_ids": batch["input_ids"], "use_cache": False}
    head = head_of(model, given, learned)
    read = head.features(given) if head else model(**given).logits
    rows = zip(read, labels, learned, strict=True)
    return torch.stack([-_nats(head, x[some], y[some], kernel) for x, y, some in rows])


def _nats(head: Head | None, x: Tensor, labels: Tensor, kernel: Kernel | None) -> Tensor:
    """Returns the sum of the cross-entropies of one row; each row has a weight of its own in the loss."""
    if head is None:
        return F.cross_entropy(precise(x), labels, reduction="sum")
    if not head.parameters():
        return cross_entropy(x, labels, head.logits, kernel=kernel)
    if not torch.is_grad_enabled():
        return _plain(head, x, labels)
    # A trained head: the gradients of its weights would otherwise be held once for every row.
    found: Tensor = checkpoint(_plain, head, x, labels, use_reentrant=False)
    return found


def _plain(head: Head, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(precise(head.logits(x)), labels, reduction="sum")


class Compared(NamedTuple):
    """scores: of the answers; divergence (n,): sum over an answer's tokens of KL(model || base), in nats."""

    scores: Scores
    divergence: Tensor


@torch.no_grad()
def compared(model: nn.Module, batch: Batch) -> Compared:
    """Returns scores and divergence from the base of every answer of a batch, in evaluation mode."""
    labels, learned = batch["labels"], batch["labels"] != IGNORED
    given = {"input_ids": batch["input_ids"], "use_cache": False}
    head, acts = head_of(model, given, learned), bool(active(model))
    own = _read(model, head, given)[learned]
    with base(model):
        other = _read(model, head, given)[learned] if acts else own
    parts = []
    for x, r, y in zip(own.split(CHUNK), other.split(CHUNK), labels[learned].split(CHUNK), strict=True):
        p = _log_softmax(head, x)
        with base(model):
            q = _log_softmax(head, r) if acts else p
        at = y[:, None]
        kl = (p.exp() * (p - q)).sum(-1)
        parts.append(torch.stack([p.gather(1, at)[:, 0], q.gather(1, at)[:, 0], kl]))
    owner, n = learned.nonzero()[:, 0], len(labels)
    every = torch.cat(parts, 1).double()
    policy, reference, divergence = every.new_zeros(3, n).index_add_(1, owner, every)
    return Compared(Scores(policy, learned.sum(1), reference), divergence)


def _read(model: nn.Module, head: Head | None, given: dict[str, object]) -> Tensor:
    found: Tensor = head.features(given) if head else model(**given).logits
    return found


def _log_softmax(head: Head | None, x: Tensor) -> Tensor:
    return F.log_softmax(precise(head.logits(x) if head else x), -1)
