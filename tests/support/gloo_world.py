"""Trains one run in several processes that are joined by gloo."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from support import tiny
from torch import Tensor

from veneer.runs.fit import fit
from veneer.train.run import Run
from veneer.train.world import World


class Gloo(World):
    """Processes of an initialised process group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, value: Any) -> Any:
        kept = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        total = kept.clone()
        dist.all_reduce(total)
        return total if isinstance(value, Tensor) else type(value)(total)

    def barrier(self) -> None:
        dist.barrier()


def train(given: dict[str, Any], meeting: str, processes: int = 2) -> list[int]:
    """Runs `fit` in as many processes; returns their exit codes."""
    started = [
        tiny._forks().Process(target=_share, args=(rank, processes, meeting, given))
        for rank in range(processes)
    ]
    for p in started:
        p.start()
    for p in started:
        p.join(300)
        if p.exitcode is None:
            p.kill()
    return [p.exitcode or 0 for p in started]


def _share(rank: int, processes: int, meeting: str, given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    try:
        fit(Run.from_dict(given), progress=False, world=Gloo())
    finally:
        dist.destroy_process_group()
