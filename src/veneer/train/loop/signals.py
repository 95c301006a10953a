"""Keeps Ctrl-C and SIGTERM as a request that the training checks between steps, so that it can save first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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


@contextmanager
def listening() -> Iterator[Wish]:
    """Within the block the first SIGINT or SIGTERM requests a clean stop; the second interrupts at once.

    Python delivers signals to the main thread only; other threads never see a request.
    """
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def keep(number: int, frame: FrameType | None) -> None:
        wish.number = number
        signal.signal(number, before[signal.Signals(number)])

    for s in before:
        signal.signal(s, keep)
    try:
        yield wish
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
