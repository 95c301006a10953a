"""Turns the errors of a full or failing disk, which every library words in its own way, into one."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.errors import NotWritten

NAMES = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS")
NUMBERS = {getattr(errno, name) for name in NAMES if hasattr(errno, name)}
RUST = re.compile(r"os error (\d+)")  # of safetensors and tokenizers
# torch.save tells nothing but the place in its source
TORCH = re.compile(r"inline_container\.cc|PytorchStreamWriter failed|unexpected pos")


def fault(e: BaseException) -> str | None:
    """Returns the system's words for the fault of a disk that an error comes from, or None for others."""
    seen: list[BaseException] = []
    while e not in seen:
        seen.append(e)
        if isinstance(e, OSError) and e.errno in NUMBERS:
            return os.strerror(e.errno or 0)
        found = RUST.search(str(e))
        if found and int(found[1]) in NUMBERS:
            return os.strerror(int(found[1]))
        if isinstance(e, RuntimeError) and TORCH.search(str(e)):
            return "the disk takes no more"
        e = e.__cause__ or e.__context__ or e
    return None


@contextmanager
def written(path: Path, n_bytes: Callable[[], int] | None = None) -> Iterator[None]:
    """Within the block, an error of the disk becomes NotWritten with the path, bytes and a way out.

    n_bytes: returns the bytes that were written before the error.
    """
    try:
        yield
    except NotWritten:
        raise
    except Exception as e:
        why = fault(e)
        if why is None:
            raise
        raise NotWritten(_sentence(path, why, n_bytes() if n_bytes else None)) from e


def named(e: BaseException) -> str | None:
    """Returns the message of an error of the disk that nobody has caught, or None for other errors."""
    why = fault(e)
    if why is None:
        return None
    name = getattr(e, "filename", None)
    return _sentence(Path(name if isinstance(name, str) else os.curdir), why, None)


def _sentence(path: Path, why: str, n_bytes: int | None) -> str:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    after = "" if n_bytes is None else f" after {n_bytes:,} bytes"
    free = shutil.disk_usage(there).free
    return (
        f"{path} could not be written: {why}{after}; {free:,} bytes are free there: make room, or choose"
        " another place, and repeat the command"
    )


def reserve(path: Path, n_bytes: int) -> None:
    """Makes the file so large that writing into its memory map cannot fail. Raises NotWritten.

    A map of a sparse file on a full disk ends the process by SIGBUS. Bytes that are there stay.
    """
    with written(path), path.open("ab") as f:
        there = f.tell()
        if n_bytes and _allocates(f.fileno(), n_bytes):
            return
        while there < n_bytes:
            there += f.write(bytes(min(1 << 20, n_bytes - there)))


def _allocates(file: int, n_bytes: int) -> bool:
    """Tells if the system allocated the room; macOS, Windows and some file systems cannot."""
    try:
        os.posix_fallocate(file, 0, n_bytes)
    except AttributeError:
        return False
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        return False
    return True
