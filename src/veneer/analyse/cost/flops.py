"""Floating-point operations of a training step, counted from the shapes that layers meet: a product of (n, k) and (k, m) is 2 n k m."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from veneer.adapt.attached import base_parameters
from veneer.sites.find import kind_of

ROWWISE = ("linear", "transposed")


class Flops(NamedTuple):
    """Of one step. forward, inputs, weights: products with the base's layers, for the gradient of their inputs and of their
    weights; attention: scores and sums, forward and backward; adapter: all that the changes add."""

    forward: int
    inputs: int
    weights: int
    attention: int
    adapter: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Count:
    """What was counted within `counting`."""

    def __init__(self, times: float) -> None:
        self.times = times
        self.forward = self.inputs = self.weights = 0
        self.operations = Operations()

    def found(self) -> Flops:
        """Of a whole step. What the layers do not explain of all products is the adapter's."""
        known = self.forward + self.inputs + self.weights
        adapter = max(0, self.operations.products - known)
        numbers = (self.forward, self.inputs, self.weights, self.operations.attention, adapter)
        return Flops(*(round(n * self.times) for n in numbers))


class Operations(TorchDispatchMode):
    """Within the block: what all products of matrices take, and what fused attention does.

    Attention is 4 b h t s d forward, and five products instead of two backward, which computes the scores again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attention = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if "_scaled_dot_product" in name:
            q, k = args[1:3] if "backward" in name else args[:2]
            self.attention += 2 * (5 if "backward" in name else 2) * math.prod(q.shape) * k.shape[-2]
        elif (packet := _written_elsewhere(func)) in flop_registry:
            self.products += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def _written_elsewhere(func: Any) -> Any:
    """The operation that takes the same arguments and writes into none of them: addmm for addmm_."""
    name = func.overloadpacket.__name__
    return getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else func.overloadpacket


@contextmanager
def counting(model: nn.Module, passes: int) -> Iterator[Count]:
    """Within the block the layers' calls and all operations are counted, of up to two of a step's passes."""
    count = Count(passes / min(passes, 2))
    own = {id(p) for p in base_parameters(model).values()}
    handles = [m.register_forward_pre_hook(_look(count)) for m in model.modules() if _is_product(m, own)]
    try:
        with count.operations:
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
