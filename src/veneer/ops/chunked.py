"""Cross-entropy behind any output head, in chunks, without holding all logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from veneer.ops.lowrank import refuse_second_order

Head = Callable[[Tensor], Tensor]  # features (n, width) -> logits (n, vocabulary)
# logits (n, vocabulary), labels (n,), smoothing -> sum of the losses, and its gradient in two parts: a
# matrix, which may be that of the logits, written over, and a number for each of its rows (n, 1), or None for
# 1
Kernel = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor | None]]

CHUNK = 256  # positions: the fastest of 128 to 1024 on a CPU, and at 32,000 tokens 16 MB of bf16 logits
BLOCK = 2**19  # numbers that are computed in float32 at a time: 2 MB, which a core's cache holds
ROWS = 2**20  # numbers that are written over at a time, being read twice


def cross_entropy(
    features: Tensor,
    labels: Tensor,
    head: Head,
    parameters: Sequence[Tensor] = (),
    *,
    smoothing: float = 0.0,
    chunk: int = CHUNK,
    kernel: Kernel | None = None,
    chunks: int | None = None,
) -> Tensor:
    """Returns the sum of cross-entropies in nats, in at least float32, with exact gradients.

    features: (n, width), those of positions with a label; labels: (n,). parameters: all leaves that
    head(features) depends on and that take a gradient: what is not listed gets none. smoothing: share of
    every label that is spread evenly over the vocabulary. chunk: positions whose logits exist at a time.
    kernel: what turns logits into the loss and its gradient, `blocked` unless given; `whole` is faster with
    the two parts of it that are long compiled. chunks: stops after so many, for estimates of memory on
    tensors without content.
    """
    run = _Run(head, labels, smoothing, chunk, kernel or blocked, chunks)
    if torch.is_grad_enabled():
        total: Tensor = _Chunked.apply(run, features, *parameters)
        return total
    return run.forward(features)


def whole(
    logits: Tensor,
    labels: Tensor,
    smoothing: float,
    compiled: Callable[[Callable[..., tuple[Tensor, ...]]], Callable[..., tuple[Tensor, ...]]] = lambda f: f,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns loss and gradient in a few formulas; `compiled` compiles a function of the logits.

    Where a label is all of its position's target, the gradient is left as exp(logits - max) over its sum: the
    division by the sum waits for the product with the head, which makes the rows many times shorter. float16
    could not hold that.
    """
    if smoothing or logits.dtype == torch.float16:
        return finish(logits, labels, smoothing, *compiled(softmax)(logits, smoothing))
    rows = torch.arange(len(labels), device=labels.device)
    right = logits[rows, labels]
    pieces = [compiled(exponentials_)(piece) for piece in logits.split(max(1, ROWS // logits.shape[-1]))]
    top, total = (torch.cat(each) for each in zip(*pieces, strict=True))
    right = right.to(total.dtype) - top[:, 0].to(total.dtype)
    logits[rows, labels] = (right.exp() - total[:, 0]).to(logits.dtype)
    return total.log().sum() - right.sum(), logits, 1 / total


def exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites logits with exp(logits - row maximum); returns maximum and exact sum, (n, 1) each."""
    top = logits.amax(-1, keepdim=True)
    wide = _wide(logits.dtype)
    exact = (logits.to(wide) - top.to(wide)).exp()
    logits.copy_(exact)
    return top, exact.sum(-1, keepdim=True)


def softmax(logits: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logsumexp (n, 1), logit sum and softmax gradient, all before the label term."""
    exact = logits.to(_wide(logits.dtype))
    total = torch.logsumexp(exact, -1, keepdim=True)
    gradient = (exact - total).exp()
    if smoothing:
        return total, exact.sum(), (gradient - smoothing / logits.shape[-1]).to(logits.dtype)
    return total, total.new_zeros(()), gradient.to(logits.dtype)


def finish(
    logits: Tensor, labels: Tensor, smoothing: float, total: Tensor, every: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, None]:
    """Returns the loss and corrects the gradient at the labels, one number per row."""
    vocabulary, rows = logits.shape[-1], torch.arange(len(labels), device=labels.device)
    right = logits[rows, labels].to(total.dtype)
    gradient[rows, labels] = ((right - total[:, 0]).exp() - (1 - smoothing) - smoothing / vocabulary).to(
        gradient.dtype
    )
    return total.sum() - (1 - smoothing) * right.sum() - smoothing / vocabulary * every, gradient, None


def blocked(
    logits: Tensor, labels: Tensor, smoothing: float, rounds: int | None = None
) -> tuple[Tensor, Tensor, None]:
    """Returns the same as `whole` without a compiler, in rounds of rows whose float32 stays in the cache.

    rounds: stops after so many, for estimates of memory on tensors without content.
    """
    vocabulary = logits.shape[-1]
    gradient, loss = torch.empty_like(logits), logits.new_zeros((), dtype=_wide(logits.dtype))
    rows = max(1, BLOCK // vocabulary)
    for i in range(0, len(labels) if rounds is None else min(rounds * rows, len(labels)), rows):
        exact, right = logits[i : i + rows].to(loss.dtype, copy=True), labels[i : i + rows, None]
        total = torch.logsumexp(exact, -1, keepdim=True)
        loss += total.sum() - (1 - smoothing) * exact.gather(1, right).sum()
        if smoothing:
            loss -= smoothing / vocabulary * exact.sum()
        exact.sub_(total).exp_()
        exact.scatter_add_(1, right, exact.new_full((), smoothing - 1).expand_as(right))
        gradient[i : i + rows] = exact.sub_(smoothing / vocabulary) if smoothing else exact
    return loss, gradient, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Run(NamedTuple):
    """All arguments but the tensors with gradients."""

    head: Head
    labels: Tensor
    smoothing: float
    chunk: int
    kernel: Kernel
    chunks: int | None

    def parts(self, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        if not len(features):
            return []
        both = zip(features.split(self.chunk), self.labels.split(self.chunk), strict=True)
        return list(both)[: self.chunks]

    def forward(self, features: Tensor) -> Tensor:
        total = features.new_zeros((), dtype=_wide(features.dtype))
        for part, labels in self.parts(features):
            total += self.loss(self.head(part), part, labels)[0]
        return total

    def loss(self, logits: Tensor, read: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the loss by a kernel that may overwrite the logits, if nothing else reads them."""
        seen = logits.untyped_storage()._cdata == read.untyped_storage()._cdata or hasattr(
            logits.grad_fn, "_saved_result"
        )
        return self.kernel(logits.detach().clone() if seen else logits.detach(), labels, self.smoothing)


class _Chunked(Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, features: Tensor, *parameters: Tensor) -> Tensor:
        total = features.new_zeros((), dtype=_wide(features.dtype))
        own = torch.zeros_like(features) if ctx.needs_input_grad[1] else None
        sums = [
            torch.zeros_like(p, dtype=_wide(p.dtype)) if n else None
            for p, n in zip(parameters, ctx.needs_input_grad[2:], strict=True)
        ]
        wanted = [p for p, s in zip(parameters, sums, strict=True) if s is not None]
        for i, (part, labels) in enumerate(run.parts(features)):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_(own is not None)
                logits = run.head(leaf)
            loss, gradient, factor = run.loss(logits, part, labels)
            total += loss
            if factor is not None and wanted:
                gradient, factor = gradient.mul_(factor), None
            found = _gradients(logits, [leaf, *wanted] if own is not None else wanted, gradient)
            if own is not None:
                first = found.pop(0)
                own[i * run.chunk : i * run.chunk + len(part)] = first if factor is None else first * factor
            for s, g in zip((s for s in sums if s is not None), found, strict=True):
                s += g
        ctx.save_for_backward(
            own, *(s if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True))
        )
        return total

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        return None, *(None if g is None else g * weight.to(g.dtype) for g in ctx.saved_tensors)


def _gradients(logits: Tensor, inputs: list[Tensor], gradient: Tensor) -> list[Tensor | float]:
    if not inputs or not logits.requires_grad:
        return [0.0 for _ in inputs]
    found = torch.autograd.grad(logits, inputs, gradient, allow_unused=True)
    return [0.0 if g is None else g for g in found]
