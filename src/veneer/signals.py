"""Ends the command line's process cleanly on SIGTERM and SIGHUP, from its first moment on."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP


class Stopped(BaseException):
    """A signal ended the work where it was; temporary files are removed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Returns 128 + signal, as shells have it."""
        return 128 + self.number


def at_once() -> None:
    """Makes the first SIGTERM or SIGHUP raise Stopped, and any second signal kill the process.

    SIGINT stays Python's KeyboardInterrupt. A signal that is ignored, as SIGHUP under nohup, stays ignored.
    """
    for number in STOPPING:
        if number != signal.SIGINT and not ignored(number):
            signal.signal(number, _stop)


def ignored(number: int) -> bool:
    """Tells if the process was started with this signal ignored."""
    return signal.getsignal(number) is signal.SIG_IGN


def kill_next() -> None:
    """Makes any further signal kill the process, even while it computes."""
    for number in STOPPING:
        if not ignored(number):
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    kill_next()
    raise Stopped(number)


def is_ours(handler: Any) -> bool:
    """Tells if a handler is that of `at_once`: the process is a command, not a user's own program."""
    return handler is _stop
