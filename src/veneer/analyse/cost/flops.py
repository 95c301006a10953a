"""Counts a training step's floating-point operations: a product of (n, k) and (k, m) takes 2 n k m."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from veneer.adapt.attached import base_parameters
from veneer.sites.finding.kinds import kind_of

ROWWISE = ("linear", "transposed")
FORWARD, BACKWARD = "attention forward", "attention backward"


class Flops(NamedTuple):
    """Operations of one step.

    forward: products with the base's layers; inputs, weights: products for the gradients of their inputs and
    weights; attention: scores and sums, forward and backward; adapter: all that the changes add.
    """

    forward: int
    inputs: int
    weights: int
    attention: int
    adapter: int

    @property
    def total(self) -> int:
        """Returns the sum of all parts."""
        return sum(self)


class Count:
    """Counts the calls of a model's layers and all matrix products, as `counting` tells it of them."""

    def __init__(self) -> None:
        self.forward = self.inputs = self.weights = self.products = self.attention = 0

    def numbers(self) -> tuple[int, ...]:
        """Returns the five counts: forward, inputs, weights, products, attention."""
        return self.forward, self.inputs, self.weights, self.products, self.attention

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Counts one operation; attention has two products, 4 b h t s d, forward and five backward."""
        kind = _kind(func)
        if kind is None:
            return
        if kind in (FORWARD, BACKWARD):  # the backward computes the scores again
            q, k = args[1:3] if kind == BACKWARD else args[:2]
            self.attention += 2 * (5 if kind == BACKWARD else 2) * math.prod(q.shape) * k.shape[-2]
        else:
            self.products += flop_registry[kind](*args, **kwargs, out_val=out)


def per_step(numbers: Sequence[int], passes: int) -> Flops:
    """Returns a step's operations from one pass's counts; the adapter's are the unexplained products."""
    forward, inputs, weights, products, attention = numbers
    adapter = max(0, products - forward - inputs - weights)
    return Flops(*(n * passes for n in (forward, inputs, weights, attention, adapter)))


@functools.cache
def _kind(func: Any) -> Any:
    """Returns FORWARD or BACKWARD for fused attention, a product's key in torch's registry, or None."""
    name = str(func)
    if "_scaled_dot_product" in name:
        return BACKWARD if "backward" in name else FORWARD
    packet = _written_elsewhere(func)
    return packet if packet in flop_registry else None


def _written_elsewhere(func: Any) -> Any:
    """Returns the operation with the same arguments that writes into none of them: addmm for addmm_."""
    name = func.overloadpacket.__name__
    return getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else func.overloadpacket


@contextmanager
def counting(model: nn.Module) -> Iterator[Count]:
    """Counts the calls of the model's layers within the block; operations are the caller's to tell."""
    count = Count()
    own = {id(p) for p in base_parameters(model).values()}
    handles = [m.register_forward_pre_hook(_look(count)) for m in model.modules() if _is_product(m, own)]
    try:
        yield count
    finally:
        for h in handles:
            h.remove()


def _is_product(module: nn.Module, own: set[int]) -> bool:
    kind = kind_of(module)
    return (
        kind is not None
        and kind.kind in ROWWISE
        and any(id(p) in own for p in module.parameters(recurse=False))
    )


def _look(count: Count) -> Any:
    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        n = 2 * x[..., 0].numel() * module.weight.numel()
        count.forward += n
        count.inputs += n * x.requires_grad
        count.weights += n * module.weight.requires_grad

    return hook
