"""Blocks below the first adapted one: what leaves them is the same whenever a window is read, and need not be computed again.

No model is known by name. The stack is the list of blocks that compilation uses too; everything else is found out by trying,
and refused where a model does more between its blocks than hand on one tensor.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.sites.blocks import blocks, reach
from veneer.train.speed.compiling import eagerly


class Prefix(NamedTuple):
    """The blocks of `stack` before number `first`. wraps: which of them return their hidden states in a tuple; width and dtype
    of hidden states."""

    stack: nn.ModuleList
    first: int
    wraps: tuple[bool, ...]
    width: int
    dtype: torch.dtype

    def bytes(self, tokens: int) -> int:
        """Of what leaves the blocks for so many tokens."""
        return tokens * self.width * self.dtype.itemsize


def look(model: nn.Module, ids: Tensor) -> Prefix:
    """The blocks of this model in which nothing is trained, found out on ids (1, t). Raises ConfigError where they cannot be kept."""
    stack, first = _lowest_trained(model)
    inputs = {"input_ids": ids, "use_cache": False}
    training, gpus = model.training, [ids.device] if ids.device.type == "cuda" else []
    wraps: dict[int, bool] = {}
    handles = [stack[i].register_forward_hook(functools.partial(_note, wraps, i)) for i in range(first)]
    try:
        with torch.random.fork_rng(gpus), torch.enable_grad(), eagerly():
            one, two = (reach(model.train(), stack[first], inputs) for _ in range(2))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not isinstance(one, Tensor) or one.shape[:2] != ids.shape or len(wraps) < first:
        raise _refused(model, "its blocks hand on something else than one tensor of hidden states")
    if one.requires_grad:
        raise _refused(model, f"something below block {first} is trained (an embedding?)")
    if not torch.equal(one, two):
        raise _refused(
            model, f"what leaves block {first - 1} is not twice the same; is there dropout in the base?"
        )
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
        raise _refused(model, "it has no stack of like blocks")
    trained = [i for i, block in enumerate(found) if any(p.requires_grad for p in block.parameters())]
    if not trained:
        raise _refused(model, "none of its blocks is trained")
    if trained[0] == 0:
        raise ConfigError(
            f"cache_frozen keeps what leaves the blocks below the first adapted one, and of {len(found)} the first is adapted already;"
            f" adapt upper ones only, with to= or exclude=, or leave it out"
        )
    return stack, trained[0]


def _note(wraps: dict[int, bool], i: int, module: nn.Module, args: Any, output: Any) -> None:
    """Writes down how block i returns its hidden states, if it returns nothing else."""
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
    """Within the block the frozen blocks are not computed, and `hidden` (b, t, width) leaves the last of them."""
    own = dict(prefix.stack._modules)
    for i, wraps in enumerate(prefix.wraps):
        prefix.stack._modules[str(i)] = _passing(prefix.stack[i], hidden, wraps)
    try:
        yield
    finally:
        prefix.stack._modules.update(own)


def _passing(block: nn.Module, hidden: Tensor, wraps: bool) -> nn.Module:
    """A twin of the block, with all that a model may ask it for, that returns `hidden` whatever it is given."""
    twin = copy.copy(block)
    twin.__dict__["forward"] = lambda *args, **options: (hidden,) if wraps else hidden
    return twin


@torch.no_grad()
def _check_equal(model: nn.Module, prefix: Prefix, inputs: Mapping[str, Any]) -> None:
    """Raises ConfigError if the model has other logits when its frozen blocks are skipped."""
    training = model.training
    model.eval()
    try:
        with eagerly():
            whole = model(**inputs).logits.float()
            hidden = reach(model, prefix.stack[prefix.first], inputs)
            short = torch.full_like(whole, torch.nan)
            with suppress(TypeError, AttributeError, IndexError), skipping(prefix, hidden):
                short = model(**inputs).logits.float()
    finally:
        model.train(training)
    eps = torch.finfo(prefix.dtype).eps
    if not float((whole - short).abs().max()) <= 32 * eps * float(whole.abs().max()):
        raise _refused(
            model, "its upper blocks take more from the lower ones than what leaves the last of them"
        )
