"""Gives all processes of a training the first one's start, and checks that nothing else differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.optim.base.groups import Part
from veneer.sites.own import is_own
from veneer.tasks import Task
from veneer.train.run import Run
from veneer.train.world import World


def same_start(
    model: nn.Module, parts: Iterable[Part], config: Mapping[str, Any], world: World, *, own_base: bool
) -> None:
    """Copies the first process' adapter to all others, in place; own_base: and the quantised base.

    Raises ConfigError, in all processes, if a weight, a text or a setting then differs between them.
    """
    if world.size == 1:
        return
    _check_plain(model, parts)
    held = {id(t): t for n, t in tensors(model) if own_base or is_own(n)}
    held |= {id(p.parameter): p.parameter for p in parts}
    world.share([t.detach() for t in held.values()])
    given = {name: json.dumps(config[name], sort_keys=True, default=list) for name in ("run", "data", "base")}
    weights = "".join(f"{n} {tuple(t.shape)} {checksum(t)}\n" for n, t in tensors(model))
    problems = [
        f"{name} of process {', '.join(map(str, odd))} differ from those of process 0"
        for name, content in (("settings", given["run"]), ("texts", given["data"]), ("weights", weights))
        if (odd := world.unlike(hashlib.sha256(content.encode()).hexdigest()))
    ]
    if world.unlike(hashlib.sha256(given["base"].encode()).hexdigest()) and not problems:
        problems.append("the processes have different base models")
    if problems:
        raise ConfigError("\n".join([*problems, "give every machine the same files and the same flags"]))


def tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns the parameters and buffers of the model by name, adapters among them."""
    return [*model.named_parameters(), *model.named_buffers()]


@torch.no_grad()
def checksum(t: Tensor) -> int:
    """Returns the sum of the tensor's words of 8 bytes, modulo 2^64; of its bytes where they do not fill
    words."""
    flat = t.detach().contiguous().reshape(-1)
    size = flat.numel() * flat.element_size()
    words = flat.view(torch.uint8) if size % 8 or flat.data_ptr() % 8 else flat.view(torch.int64)
    return int(words.sum(dtype=torch.int64))


def _check_plain(model: nn.Module, parts: Iterable[Part]) -> None:
    """Asserts that every trained parameter is a whole, plain tensor on one device, and all others frozen."""
    found = {id(p.parameter): p for p in parts}
    kinds = sorted({type(p.parameter.data).__name__ for p in found.values()} - {"Tensor"})
    devices = {p.parameter.device for p in found.values()}
    if kinds or len(devices) > 1:
        got = f"types {', '.join(kinds) or 'Tensor'} on {', '.join(sorted(map(str, devices)))}"
        raise ConfigError(f"trained parameters must be plain tensors on one device, got {got}")
    loose = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in found]
    if loose:
        raise ConfigError(f"{len(loose)} parameters have gradients that no process joins, such as {loose[0]}")


def check_batches(run: Run, task: Task, world: World) -> None:
    """Raises ConfigError for batches that the processes cannot share."""
    if task.COMPARES and run.accumulate % world.size:
        raise ConfigError(
            f"task {run.task!r} compares the examples of a batch, which {world.size} processes cannot divide;"
            f" set accumulate to a multiple of {world.size}, got {run.accumulate}"
        )
    if not task.COMPARES and run.batch < world.size:
        raise ConfigError(
            f"batch must be {world.size} or more for {world.size} processes, which share every batch, got"
            f" {run.batch}"
        )
