"""Runs in each of several gloo processes: computes a share of the batches and keeps the sums over all."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import veneer


def layers() -> nn.Module:
    """Two layers wide enough that their gradients are sketched, not kept."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 36))


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 40, generator=draw), torch.randn(6, 36, generator=draw)) for _ in range(n)]


def calibrated(some: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    found = veneer.calibrate(
        layers(), some, rank=1, loss=lambda model, b: (model(b[0]) - b[1]).square().sum()
    )
    return {
        f"{site}.{k}": t.contiguous()
        for site, stats in found.items()
        for k, t in stats.gradient._asdict().items()
    }


def share(rank: int, world: int, folder: str) -> None:
    """Every world-th batch here, the sum of all in the file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    try:
        save_file(calibrated(batches(5)[rank::world]), Path(folder) / f"{rank}.safetensors")
    finally:
        torch.distributed.destroy_process_group()
