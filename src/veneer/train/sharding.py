"""Divides the frozen blocks of a base among processes (FSDP2); adapters stay whole in each.

Only one block is whole at a time, forward and backward. The adapters' gradients are joined as without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from veneer.errors import ConfigError, first_few
from veneer.optim.base.groups import Part
from veneer.sites.blocks import blocks
from veneer.sites.own import is_own
from veneer.tasks import Task
from veneer.train.world import World


def shard(model: nn.Module, task: Task, parts: Sequence[Part], world: World, device: torch.device) -> int:
    """Divides the blocks of the task's body, in place, and moves the rest to the device.

    Returns the bytes of the base that this process holds. Raises ConfigError for a model without blocks, and
    if a parameter is divided that must be whole, or whole that must be divided.
    """
    body = task.body(model)
    found = blocks(body)
    if not found:
        raise ConfigError(f"shard needs a model of repeated blocks, which {type(model).__name__} lacks")
    whole = _whole(model, found, parts)
    for t in [*whole, *model.buffers()]:
        t.data = t.data.to(device)
    mesh = init_device_mesh(device.type, (world.size,))
    for block in found:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(body, mesh=mesh, ignored_params=whole)
    check(model, found, whole)
    return sum(_held(p) for n, p in model.named_parameters() if not is_own(n))


def _whole(model: nn.Module, found: Sequence[nn.Module], parts: Sequence[Part]) -> set[nn.Parameter]:
    """Returns the parameters that stay whole: adapters, trained ones, and all outside of the blocks."""
    own = {part.parameter for part in parts} | {p for n, p in model.named_parameters() if is_own(n)}
    inside = {p for block in found for p in block.parameters()}
    return own | {p for p in model.parameters() if p not in inside}


def check(model: nn.Module, found: Sequence[nn.Module], whole: set[nn.Parameter]) -> None:
    """Raises ConfigError unless the frozen parameters of the blocks are divided, and no others."""
    kept = {id(p) for p in whole}
    names = {id(p): n for n, p in model.named_parameters()}
    divided = [p for block in found for p in block.parameters() if id(p) not in kept]
    wrong = [names[id(p)] for p in divided if not isinstance(p, DTensor)]
    wrong += [names[id(p)] for p in whole if isinstance(p, DTensor)]
    if wrong or not divided:
        raise ConfigError(f"the base was not divided as shard asks: {first_few(wrong) or 'no parameter is'}")


def _held(p: nn.Parameter) -> int:
    local = p.to_local() if isinstance(p, DTensor) else p
    return local.numel() * local.element_size()
