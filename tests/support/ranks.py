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

SECONDS = 120


class Ranks:
    """`size` processes of one group."""

    def __init__(self, size: int, folder: str) -> None:
        context = tiny._forks()
        self.size, self.connections, self.processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            own = context.Process(target=serve, args=(rank, size, f"{folder}/meeting", theirs), daemon=True)
            own.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(own)

    def call(self, function: str, *args: Any, **options: Any) -> list[Any]:
        """Returns what "module:name"(world, ..) returned in each process; raises their first error."""
        for c in self.connections:
            c.send((function, args, options))
        found = []
        for rank, c in enumerate(self.connections):
            assert c.poll(SECONDS), f"process {rank} does not answer {function}"
            found.append(c.recv())
        for kind, value in found:
            if kind == "error":
                raise AssertionError(value)
        return [value for _, value in found]

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
