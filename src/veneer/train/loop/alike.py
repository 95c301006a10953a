"""Compares the processes' parameters and moments before a checkpoint: a divergence is never silent."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.errors import first_few, option
from veneer.train.errors import Unlike
from veneer.train.folder import checkpoint
from veneer.train.loop.drawing import STATE
from veneer.train.same_start import checksum

if TYPE_CHECKING:
    from veneer.train.loop.loop import Loop

COMPARED = ("p.", "m.", "b.", "o.", STATE)  # of a checkpoint's tensors; dropout's states differ on purpose


def check(loop: Loop, tensors: dict[str, Tensor]) -> None:
    """Raises Unlike, in all processes, if a trained tensor of a checkpoint differs between them.

    tensors: those of the checkpoint. A healthy training differs in no bit: all processes add the same sums.
    """
    world = loop.world
    if world.size == 1:
        return
    own = {n: t for n, t in tensors.items() if n.startswith(COMPARED)}
    sums = {n: checksum(t) for n, t in sorted(own.items())}
    content = "".join(f"{n} {tuple(own[n].shape)} {s}\n" for n, s in sums.items())
    odd = world.unlike(hashlib.sha256(content.encode()).hexdigest())
    if not odd:
        return
    every = torch.zeros(world.size, len(sums), dtype=torch.int64)
    every[world.rank] = torch.tensor(list(sums.values()), dtype=torch.int64)
    every = world.sum(every)
    names = [n for n, alike in zip(sums, (every == every[0]).all(0).tolist(), strict=True) if not alike]
    kept = [path.name for path in checkpoint.found(loop.checkpoints)]
    raise Unlike(
        f"after step {loop.position.step} process {', '.join(map(str, odd))} holds other numbers than process"
        f" 0 in {len(names)} of {len(sums)} tensors: {first_few(names)}; nothing of this step is saved. Check"
        f" the memory of its machine, then go on from {kept[-1] if kept else 'step 0'} with"
        f" {option('resume', True)}"
    )
