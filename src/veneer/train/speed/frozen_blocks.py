"""Blocks below the first adapted one: their hidden states depend on the example alone and can be cached.

No model is known by name. The stack is the list of blocks that compilation uses too; a trial finds the rest.
A model that passes more than one tensor between its blocks is refused.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating, in_mode
from veneer.errors import ConfigError
from veneer.sites.blocks import blocks, reach
from veneer.train.speed.compiling import eagerly


class Prefix(NamedTuple):
    """The blocks of `stack` before number `first`. wraps: for each, if it returns hidden states in a tuple.

    width, dtype: of the hidden states.
    """

    stack: nn.ModuleList
    first: int
    wraps: tuple[bool, ...]
    width: int
    dtype: torch.dtype

    def bytes(self, tokens: int) -> int:
        """Returns the bytes of the hidden states of so many tokens."""
        return tokens * self.width * self.dtype.itemsize


def look(model: nn.Module, inputs: Mapping[str, Any], size: int) -> Prefix:
    """Returns the blocks in which nothing is trained, found by a trial.

    Raises ConfigError if they cannot be cached.

    inputs: of a batch with one example of this size.
    """
    stack, first = _lowest_trained(model)
    device = next(model.parameters()).device
    gpus = [device] if device.type == "cuda" else []
    wraps: dict[int, bool] = {}
    handles = [stack[i].register_forward_hook(functools.partial(_note, wraps, i)) for i in range(first)]
    try:
        with torch.random.fork_rng(gpus), torch.enable_grad(), eagerly(), in_mode(model, training=True):
            one, two = (reach(model, stack[first], inputs) for _ in range(2))
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(one, Tensor) or one.shape[:2] != (1, size) or len(wraps) < first:
        raise _refused(model, "its blocks pass more than one tensor of hidden states")
    if one.requires_grad:
        raise _refused(model, f"something below block {first} is trained (an embedding?)")
    if not torch.equal(one, two):
        raise _refused(model, f"two passes differ behind block {first - 1}; does the base have dropout?")
    found = Prefix(stack, first, tuple(wraps[i] for i in range(first)), one.shape[-1], one.dtype)
    _check_equal(model, found, inputs)
    return found


def _refused(model: nn.Module, why: str) -> ConfigError:
    return ConfigError(f"cache_frozen cannot be used with this {type(model).__name__}: {why}; leave it out")


def _lowest_trained(model: nn.Module) -> tuple[nn.ModuleList, int]:
    found = blocks(model)
    stack = next(
        (m for m in model.modules() if isinstance(m, nn.ModuleList) and found and list(m) == found), None
    )
    if stack is None:
        raise _refused(model, "it lacks a stack of similar blocks")
    trained = [i for i, block in enumerate(found) if any(p.requires_grad for p in block.parameters())]
    if not trained:
        raise _refused(model, "none of its blocks is trained")
    if trained[0] == 0:
        raise ConfigError(
            f"cache_frozen needs blocks below the first adapted one, and of {len(found)} the first is"
            " adapted; adapt"
            " upper ones only, with to= or exclude=, or leave it out"
        )
    return stack, trained[0]


def _note(wraps: dict[int, bool], i: int, module: nn.Module, args: Any, output: Any) -> None:
    """Records how block i returns its hidden states, if it returns nothing else."""
    if isinstance(output, Tensor):
        wraps[i] = False
    elif (
        isinstance(output, tuple)
        and isinstance(output[0], Tensor)
        and all(rest is None for rest in output[1:])
    ):
        wraps[i] = True


@contextmanager
def skipping(prefix: Prefix, hidden: Tensor) -> Iterator[None]:
    """Within the block the frozen blocks are skipped, and the last of them returns `hidden` (b, t, width)."""
    own = dict(prefix.stack._modules)
    for i, wraps in enumerate(prefix.wraps):
        prefix.stack._modules[str(i)] = _passing(prefix.stack[i], hidden, wraps)
    try:
        yield
    finally:
        prefix.stack._modules.update(own)


def _passing(block: nn.Module, hidden: Tensor, wraps: bool) -> nn.Module:
    """Returns a twin of the block, with all its attributes, that returns `hidden` for any input."""
    twin = copy.copy(block)
    twin.__dict__["forward"] = lambda *args, **options: (hidden,) if wraps else hidden
    return twin


@torch.no_grad()
def _check_equal(model: nn.Module, prefix: Prefix, inputs: Mapping[str, Any]) -> None:
    """Raises ConfigError if the model's outputs change when its frozen blocks are skipped."""
    with evaluating(model), eagerly():
        whole = _output(model(**inputs))
        hidden = reach(model, prefix.stack[prefix.first], inputs)
        short = torch.full_like(whole, torch.nan)
        with suppress(TypeError, AttributeError, IndexError), skipping(prefix, hidden):
            short = _output(model(**inputs))
    eps = torch.finfo(prefix.dtype).eps
    if not float((whole - short).abs().max()) <= 32 * eps * float(whole.abs().max()):
        raise _refused(model, "its upper blocks read more of the lower ones than the last hidden states")


def _output(found: Any) -> Tensor:
    """Returns the first tensor of a model's output, such as its logits."""
    logits = getattr(found, "logits", None)
    first: Tensor = found if isinstance(found, Tensor) else found[0] if logits is None else logits
    return first.float()
