"""Makes a training fast before its first step: shared products, torch.compile of blocks and loss."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.acting.shared_inputs import discover, ungroup
from veneer.adapt.modes import in_mode
from veneer.errors import ConfigError
from veneer.ops.chunked import Kernel, whole
from veneer.sites.blocks import blocks
from veneer.tasks import Batch, Objective, Task
from veneer.tasks.base.abilities import Decoder
from veneer.train.speed import fast_attention, graph_key, graphs
from veneer.train.speed.compile_settings import lean

# A run is long enough for `auto` if its products take about ten minutes: 4 per parameter and token, at the
# speed of a core or a GPU. Compilation takes about one minute and shortens steps by a quarter to a third.
LONG = {"cpu": 600 * 1e11, "cuda": 600 * 1e14}
COMPILERS = ("g++", "clang++", "c++", "cl")


def is_long(model: nn.Module, tokens: float, device: torch.device) -> bool:
    """Tells if compilation pays in a training on that many tokens."""
    return 4 * sum(p.numel() for p in model.parameters()) * tokens >= LONG.get(device.type, float("inf"))


def missing(device: torch.device) -> str | None:
    """Returns the tool that torch.compile needs on this device and does not find, or None."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "the package triton"
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return None if any(map(shutil.which, wanted)) else f"a C++ compiler ({', '.join(wanted)})"


class Shapes(NamedTuple):
    """Shapes of the batches that run compiled, one graph each; a batch of other than `rows` rows runs
    eagerly."""

    rows: int
    widths: tuple[int, ...]


def prepare(
    model: nn.Module, task: Task, batch: Batch, *, compiled: bool = False, with_graphs: bool = False
) -> Objective:
    """Returns the task's objective for this model, as fast as possible; `restore` undoes all.

    batch: any one of the training, for a dry run that finds layers with a common input. compiled: compiles
    repeated blocks on their first call, which takes up to a minute for each shape of a batch; with_graphs: as
    CUDA graphs.
    """
    restore(model)
    with discover(model), torch.no_grad():
        task.loss(model, batch)
    if isinstance(task, Decoder):
        fast_attention.use_faster(model, task.tokens(batch), compiled=compiled)
    if not compiled:
        return task.loss
    compile_blocks(model, task, {"options": graphs.OPTIONS} if with_graphs else {})
    objective = lean(task.objective(compiled_kernel()))
    return graphs.on_graphs(objective) if with_graphs else objective


def compile_blocks(model: nn.Module, task: Task, options: Mapping[str, Any] | None = None) -> None:
    """Compiles the repeated blocks of the model, or its body without such, on their first call."""
    graph_key.use()
    body = task.body(model)
    for block in blocks(body) or [body]:  # one graph a shape, in any order: a resumed training is the same
        block.compile(dynamic=False, **(options or {}))


def warm_up(model: nn.Module, objective: Objective, batch: Batch, *, smoothing: float = 0.0) -> float:
    """Compiles everything in a first step that changes nothing, and returns its seconds.

    Raises ConfigError.
    """
    started, device = time.monotonic(), next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), in_mode(model, training=True):
            loss = objective(model, batch, smoothing=smoothing)[0]
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
    except RuntimeError as e:
        restore(model)
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise ConfigError(f"torch.compile cannot compile this model: {lines[0]}; use compile='off'") from e
    finally:
        model.zero_grad(set_to_none=True)
        _give_back_memory()
    return time.monotonic() - started


def _give_back_memory() -> None:
    """Returns the compiler's memory, a hundred megabytes or more, to the system, if its library can do
    that."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def eagerly(wanted: bool = True) -> Iterator[None]:
    """Within the block nothing is compiled or runs compiled; `wanted` False changes nothing."""
    if not wanted:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def widths(length: int, packing: bool) -> tuple[int, ...]:
    """Returns the widths of batches in a compiled training: few, as each is compiled for itself.

    Packed windows are nearly full; their blocks exist with and without a mask, so that three widths make six
    of the eight graphs that torch.compile allows for one function.
    """
    eighths = (2, 4, 8) if packing else range(1, 9)
    return tuple(sorted({-(-length * n // 8) for n in eighths}))


def restore(model: nn.Module) -> None:
    """Undoes `prepare`."""
    ungroup(model)
    fast_attention.use_own(model)
    for module in model.modules():
        module._compiled_call_impl = None


def recompute(model: Any, wanted: bool) -> None:
    """Makes the model keep each block's input alone and recompute the rest in the backward.

    Raises ConfigError.
    """
    if not wanted:
        return
    try:
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )  # its older name
        enable({"use_reentrant": False})
    except (AttributeError, ValueError):
        raise ConfigError(
            f"a {type(model).__name__} cannot recompute its blocks; use gradient_checkpointing=False"
        ) from None


@contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Within the block the model recomputes its blocks in the backward. Raises ConfigError."""
    recompute(model, True)
    try:
        yield
    finally:
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


@functools.cache
def compiled_kernel() -> Kernel:
    """Returns the loss of one chunk, compiled once for any number of positions."""
    return functools.partial(whole, compiled=functools.cache(_for_any_number))


def _for_any_number(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    compiled = torch.compile(function)

    def act(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        if len(logits) > 1:  # a size of 1 is always compiled for itself
            torch._dynamo.maybe_mark_dynamic(logits, 0)
        return compiled(logits, *rest)

    return act
