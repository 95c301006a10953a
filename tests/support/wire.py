"""Counts the bytes that a process hands to collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

GATHERS = tuple(name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name))
NAMES = ("all_reduce", "broadcast", "reduce_scatter_tensor", "all_gather", "reduce", *GATHERS)


class Counted:
    """`total`: bytes so far; `calls`: by name."""

    def __init__(self) -> None:
        self.total, self.calls = 0, dict.fromkeys(NAMES, 0)


@contextmanager
def counted() -> Iterator[Counted]:
    """Counts within the block."""
    found = Counted()

    def watching(name: str) -> Any:
        own = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            # A gather names what it hands over behind what it fills.
            named = options.get("input_tensor", options.get("input"))
            place = args[1:] if name in GATHERS else args
            given = next(a for a in (named, *place) if isinstance(a, Tensor))
            found.total += given.numel() * given.element_size()
            found.calls[name] += 1
            return own(*args, **options)

        return mock.patch.object(dist, name, call)

    patches = [watching(name) for name in NAMES]
    for p in patches:
        p.start()
    try:
        yield found
    finally:
        for p in patches:
            p.stop()
