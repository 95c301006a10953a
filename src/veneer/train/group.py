"""The processes of a launcher such as torchrun, joined by torch.distributed: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from veneer.errors import ConfigError, VeneerError, option
from veneer.launcher import Launched, launched
from veneer.train.world import ALONE, World

# Seconds that a step's exchange waits for a process that hangs. A process that ends is seen at once.
STEP = float(os.environ.get("VENEER_STEP_TIMEOUT", "120"))
LONG = timedelta(hours=12)  # for the first process' files and reports


class Lost(VeneerError):
    """Another process ended, or hung for longer than the timeout."""


class Group(World):
    """All processes of torch.distributed, which must be initialised.

    Raises Lost, with the exchange that failed, if another process ends or hangs.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._patient = dist.new_group(backend="gloo", timeout=LONG)

    def sum(self, value: Any) -> Any:
        """Returns the sum of all processes' numbers or tensors, the same in each."""
        if isinstance(value, Tensor):
            total = value.clone(memory_format=torch.contiguous_format)
            self._exchange("sum of tensors", partial(dist.all_reduce, total))
            return total
        counts = torch.tensor(value, dtype=torch.float64)
        self._exchange("sum of counts", partial(dist.all_reduce, counts))
        return type(value)(counts.item())

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Replaces each tensor by the one of process `source`."""
        for t in tensors:
            sent = t.detach().contiguous()
            self._exchange("share of tensors", partial(dist.broadcast, sent, source))
            if sent.data_ptr() != t.data_ptr():
                t.copy_(sent)

    def barrier(self) -> None:
        """Waits until all processes are here, for hours if the first one writes files."""
        self._exchange("barrier", partial(dist.barrier, self._patient))

    def _exchange(self, name: str, run: Callable[[], Any]) -> None:
        try:
            run()
        except RuntimeError as e:
            why = str(e).strip().splitlines()[0]
            raise Lost(
                f"process {self.rank} of {self.size}: the {name} failed: another process ended, or hung for"
                f" {STEP:g} s ({why}); see its message, then go on with {option('resume', True)}"
            ) from e


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Joins the processes that a launcher started, within the block. device: the setting of the run.

    A group that is initialised already is used and left. Yields ALONE without a launcher. Raises ConfigError
    for a device that the processes of one machine cannot share.
    """
    if dist.is_available() and dist.is_initialized():
        yield Group() if dist.get_world_size() > 1 else ALONE
        return
    own = launched()
    if own.size == 1:
        yield ALONE
        return
    cuda = _on_cuda(device, own)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=STEP))
    try:
        yield Group()
    finally:
        dist.destroy_process_group()


def _on_cuda(device: str, own: Launched) -> bool:
    """Chooses this process' GPU, and tells if there is one. Raises ConfigError."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return False
    if device not in ("auto", "cuda"):
        got = option("device", device)
        raise ConfigError(f"{own.size} processes need a device each, got {got}; leave it out")
    found = torch.cuda.device_count()
    if own.local >= found:
        raise ConfigError(
            f"process {own.rank}: each process of a machine needs its own GPU, got {found} for"
            f" {own.local + 1} or more; start fewer, or set {option('device', 'cpu')}"
        )
    torch.cuda.set_device(own.local)
    return True
