"""Ends a training before its n-th change to a folder, as a kill would: nothing is cleaned up."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Events of the interpreter that change a folder; each is raised before the system call.
CHANGES = {
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink"),
    *("fcntl.flock", "open"),
}
WRITES = os.O_WRONLY | os.O_RDWR


class Dead(BaseException):
    """Raised in place of a kill, and by every later change, so that no cleaning up succeeds."""


class Watch:
    """Counts the changes below a folder. at: the change before which all ends; torn: its file is begun.

    really: ends the process by SIGKILL instead of Dead.
    """

    def __init__(self, folder: Path, at: int = 0, *, torn: bool = False, really: bool = False) -> None:
        self.folder, self.at, self.torn, self.really = str(folder), at, torn, really
        self.events: list[str] = []
        self.dead = self.over = False

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        if self.over or event not in CHANGES or not self._is_change(event, args):
            return
        if self.dead:
            raise Dead
        self.events.append(f"{event} {args[0]}")
        if len(self.events) == self.at:
            self.dead = True
            if self.torn and event == "open":
                self.over = True
                with open(args[0], "ab" if args[2] & os.O_APPEND else "wb") as f:
                    f.write(b'{"torn')
                self.over = False
            if self.really:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Dead

    def _is_change(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open" and not args[2] & WRITES:
            return False
        if isinstance(args[0], int):  # a descriptor: of the lock alone
            return event == "fcntl.flock"
        inside = os.fspath(args[0])
        inside = inside.decode() if isinstance(inside, bytes) else inside
        by_descriptor = event in ("os.remove", "os.rmdir") and args[-1] != -1  # within shutil.rmtree
        return by_descriptor or inside.startswith(self.folder)


_watches: list[Watch] = []


def _see(event: str, args: tuple[Any, ...]) -> None:
    for watch in _watches:
        watch.see(event, args)


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Within the block the watch sees every change; a hook cannot be taken out, so it is put in once."""
    if not getattr(sys, "_veneer_watched", False):
        sys.addaudithook(_see)
        sys._veneer_watched = True  # type: ignore[attr-defined]
    _watches.append(watch)
    try:
        yield watch
    finally:
        watch.over = True
        _watches.remove(watch)
