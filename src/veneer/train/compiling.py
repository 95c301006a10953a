"""What makes a training fast before its first step: shared products, and torch.compile of the body and of the loss."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from veneer.adapt.discover import discover, ungroup
from veneer.adapt.head import cut
from veneer.ops.chunked import Kernel, finish, softmax
from veneer.tasks import Batch, Objective, causal_lm
from veneer.train import attention


def prepare(model: nn.Module, batch: Batch, *, compiled: bool = False) -> Objective:
    """The objective to train this model with, as fast as it goes; the model is changed in nothing but its speed.

    batch: any one of the training's, for a dry run that finds the layers with a common input. compiled: the model's
    repeated blocks are compiled when first called, which takes a minute or less. `restore` undoes all.
    """
    restore(model)
    with discover(model), torch.no_grad():
        causal_lm.loss(model, batch)
    if not compiled:
        return causal_lm.loss
    attention.use_short(model)
    head = cut(model)
    body = model if head is None else head.body
    for block in blocks(body) or [body]:
        block.compile()
    return functools.partial(causal_lm.loss, kernel=compiled_kernel())


def restore(model: nn.Module) -> None:
    """Undoes `prepare`."""
    ungroup(model)
    attention.use_own(model)
    for module in model.modules():
        module._compiled_call_impl = None


def blocks(body: nn.Module) -> list[nn.Module]:
    """The layers of a stack, all of one class: compiled one by one they share one graph, which compiles many times faster."""
    stacks = [list(m) for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    alike = [s for s in stacks if len({type(layer) for layer in s}) == 1 and any(True for _ in s[0].children())]
    size = {id(s): sum(p.numel() for layer in s for p in layer.parameters()) for s in alike}
    return max(alike, key=lambda s: size[id(s)], default=[])


@functools.cache
def compiled_kernel() -> Kernel:
    """The loss of one chunk, compiled once for any number of positions."""
    compiled = torch.compile(softmax)

    def kernel(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        if len(labels) > 1:  # a size of 1 is always compiled for itself
            torch._dynamo.maybe_mark_dynamic(logits, 0)
        return finish(logits, labels, smoothing, *compiled(logits, smoothing))

    return kernel
