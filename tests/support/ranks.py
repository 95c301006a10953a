"""Processes joined by gloo that stay for many tests: each call runs one function in all of them."""

from __future__ import annotations

import importlib
import tempfile
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import tiny

from veneer.train.group import Group

SECONDS, LATER = 300, 20  # for a process that hangs; a busy machine needs some for one that does not


class Ranks:
    """`size` processes of one group."""

    def __init__(self, size: int, folder: str) -> None:
        self.size, self.folder, self.starts = size, folder, 0
        self.start()

    def start(self) -> None:
        context, self.starts = tiny._forks(), self.starts + 1
        self.connections, self.processes = [], []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            meeting = f"{self.folder}/meeting-{self.starts}"
            own = context.Process(target=serve, args=(rank, self.size, meeting, theirs), daemon=True)
            own.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(own)

    def call(self, function: str, *args: Any, **options: Any) -> list[Any]:
        """Returns what "module:name"(world, ..) returned in each process; raises their first error."""
        for c in self.connections:
            c.send((function, args, options))
        found, seconds, error = [], SECONDS, ""
        for rank, c in enumerate(self.connections):
            kind, value = c.recv() if c.poll(seconds) else ("silent", f"process {rank} does not answer")
            found.append(value)
            error = error or (value if kind != "value" else "")
            seconds = LATER if error else SECONDS  # the others may wait for one that failed
            if kind == "silent":
                self.kill()
                self.start()
                break
        if error:
            raise AssertionError(error)
        return found

    def kill(self) -> None:
        for p in self.processes:
            p.kill()
            p.join()

    def close(self) -> None:
        for c in self.connections:
            c.send(None)
        for p in self.processes:
            p.join(10)
            if p.is_alive():
                p.kill()


def serve(rank: int, size: int, meeting: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    world = Group()
    while (asked := connection.recv()) is not None:
        function, args, options = asked
        module, _, name = function.partition(":")
        try:
            found = ("value", getattr(importlib.import_module(module), name)(world, *args, **options))
        except Exception:
            found = ("error", f"process {rank}: {traceback.format_exc()}")
        connection.send(found)
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Two processes."""
    yield from _held(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four processes."""
    yield from _held(4)


def _held(size: int) -> Iterator[Ranks]:
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(size, str(Path(folder)))
        yield ranks
        ranks.close()
