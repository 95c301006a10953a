"""Keeps Ctrl-C, SIGTERM and SIGHUP as a request that the training checks between steps, so that it can save
first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

from torch._guards import CompileContext

from veneer.signals import STOPPING, Stopped, ignored, is_ours, kill_next


class Stop(Exception):
    """Raised between steps, or between the batches of an evaluation, once a signal has come."""


class Wish:
    """`number` is the signal that came, or None."""

    def __init__(self) -> None:
        self.number: int | None = None

    def check(self) -> None:
        """Raises Stop if a signal has come."""
        if self.number is not None:
            raise Stop


_given: ContextVar[Wish | None] = ContextVar("wish", default=None)


@contextmanager
def hearing(wish: Wish) -> Iterator[None]:
    """Within the block trainings of this thread stop as `wish` says, which another thread may set."""
    before = _given.set(wish)
    try:
        yield
    finally:
        _given.reset(before)


@contextmanager
def listening(*, alone: bool = True) -> Iterator[Wish]:
    """Within the block the first SIGINT, SIGTERM or SIGHUP requests a clean stop; the second ends at once.

    While PyTorch compiles, which takes minutes, the first one raises Stopped at once, unless other processes
    train too (`alone` False) and would wait for this one. Python delivers signals to the main thread only;
    other threads see only the request of `hearing`.
    """
    wish = _given.get() or Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {s: signal.getsignal(s) for s in STOPPING if not ignored(s)}

    def keep(number: int, frame: FrameType | None) -> None:
        wish.number = number
        if any(map(is_ours, before.values())):
            kill_next()
        else:  # of a program that calls the library
            _restore(before)
        if alone and CompileContext.try_get() is not None:
            raise Stopped(number)

    for s in before:
        signal.signal(s, keep)
    try:
        yield wish
    finally:
        if wish.number is None:
            _restore(before)


def _restore(before: Mapping[int, Any]) -> None:
    for s, handler in before.items():
        signal.signal(s, handler)
