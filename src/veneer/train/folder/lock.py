"""One training a folder: a lock that the operating system takes back when its holder ends, however it
ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from veneer.errors import ConfigError
from veneer.train.errors import Busy

NAME = "lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within the block no other process, and no other thread, may train into the folder.

    Raises Busy, naming the holder.
    """
    with open(folder / NAME, "a+", encoding="utf-8", opener=_own) as f:
        if not _take(f):
            f.seek(0)
            holder = f.read().strip() or "unknown"
            raise Busy(
                f"{folder} is being written by another training ({holder}); wait for it, or choose another"
                " folder with out="
            )
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        f.flush()
        yield


def _own(path: str, flags: int) -> int:
    """Opens the lock itself. Raises ConfigError for a symbolic link, whose target would be cut to nothing."""
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise ConfigError(f"{path}: the lock is a symbolic link; remove it") from None


def _take(f: IO[str]) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            f.seek(0x7FFF)  # Windows locks bytes; one that nobody reads
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        else:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
