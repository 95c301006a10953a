"""The processes of a launcher such as torchrun, joined by torch.distributed: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from veneer.errors import ConfigError, VeneerError, option
from veneer.launcher import Launched, launched
from veneer.train import meeting, roll_call
from veneer.train.world import ALONE, World

# Seconds that a step's exchange waits for a process that hangs. A process that ends is seen at once.
STEP = float(os.environ.get("VENEER_STEP_TIMEOUT", "120"))
START = 600.0  # seconds for all processes to import PyTorch
LONG = timedelta(hours=12)  # for the first process' files and reports
# In the texts of gloo's and NCCL's errors, which have no type of their own.
OF_EXCHANGE = re.compile("gloo|nccl|connection|timed out", re.IGNORECASE)
TIMED_OUT = re.compile("timed? ?out", re.IGNORECASE)


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
            with self.exchange("sum of tensors"):
                dist.all_reduce(total)
            return total
        counts = torch.tensor(value, dtype=torch.float64)
        with self.exchange("sum of counts"):
            dist.all_reduce(counts)
        return type(value)(counts.item())

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Replaces each tensor by the one of process `source`."""
        for t in tensors:
            sent = t.detach().contiguous()
            with self.exchange("share of tensors"):
                dist.broadcast(sent, source)
            if sent.data_ptr() != t.data_ptr():
                t.copy_(sent)

    def barrier(self) -> None:
        """Waits until all processes are here, for hours if the first one writes files."""
        with self.exchange("barrier"):
            dist.barrier(self._patient)

    @contextmanager
    def exchange(self, name: str) -> Iterator[None]:
        """Raises Lost for an exchange that fails within the block, with the processes that hang."""
        try:
            yield
        except RuntimeError as e:
            if not _is_of_exchange(e):
                raise
            raise Lost(
                f"process {self.rank} of {self.size}: the {name} failed: {self._why(str(e))}; see its"
                f" message, then go on with {option('resume', True)}"
            ) from e

    def _why(self, error: str) -> str:
        first = error.strip().splitlines()[0]
        if not TIMED_OUT.search(first):
            return f"another process ended ({first})"
        hung = roll_call.missing(self.rank, self.size, STEP / 4)
        named = f"process {', '.join(map(str, hung))}" if hung else "another process"
        return f"{named} hung for {STEP:g} s ({first})"


def _is_of_exchange(e: RuntimeError) -> bool:
    return isinstance(e, dist.DistError) or OF_EXCHANGE.search(str(e)) is not None


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
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=START)))
    own_store = meeting.own_part(store, rank, size, START)
    wait = timedelta(seconds=STEP)
    dist.init_process_group(backend, store=own_store, rank=rank, world_size=size, timeout=wait)
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
