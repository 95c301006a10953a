"""Writes files and folders whole or not at all: under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer import disk, foreign
from veneer.errors import ConfigError, FormatError, option

# Endings of files that hold Python objects: reading one runs whatever code it names.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


def check_new(path: str | Path, name: str = "out") -> None:
    """Raises ConfigError if the path of the setting `name` exists or cannot be made. Writes nothing."""
    if problem := unusable(Path(path), name):
        raise ConfigError(problem)


def unusable(path: Path, name: str = "out", *, new: bool = True) -> str | None:
    """Returns why nothing can be written at the path, or None. new: a path that exists is a reason."""
    setting = f"{option(name)} {path}"
    if new and path.exists():
        return f"{setting} exists; choose another or remove it"
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    if there != path and not there.is_dir():
        return f"{setting}: {there} is a file; choose another folder"
    if not os.access(there, os.W_OK):
        return f"{setting}: {there} is not writable for this user; choose another folder"
    return None


def beside(path: Path) -> Path:
    """Returns a new temporary name in the path's folder, as `left_over` knows them."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Yields temporary names beside `paths`; their files replace `paths`, in order, once all are on disk.

    If the block, or anything before the first rename, fails, the old files are unchanged and nothing is left
    over. Raises NotWritten if the disk is full.
    """
    temporary, new = [beside(p) for p in paths], _missing(p.parent for p in paths)
    try:
        with disk.written(paths[0]):
            for folder in {p.parent for p in paths}:
                folder.mkdir(parents=True, exist_ok=True)
        with disk.written(paths[0], lambda: _bytes(temporary)):
            yield temporary
            as_usual(temporary)
            for t in temporary:
                sync(t)
            for t, p in zip(temporary, paths, strict=True):
                os.replace(t, p)
            for folder in {p.parent for p in paths}:
                sync(folder)
    finally:
        for t in temporary:
            t.unlink(missing_ok=True)
        for folder in new:
            with suppress(OSError):  # it holds what was written
                folder.rmdir()


def _missing(folders: Iterable[Path]) -> list[Path]:
    """Returns those of the folders, and of the folders above them, that do not exist, innermost first."""
    every = {f for folder in folders for f in (folder, *folder.parents) if not f.exists()}
    return sorted(every, key=lambda f: len(f.parts), reverse=True)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder` that becomes `folder` once all its files are on disk.

    If the block, or anything before the rename, fails, nothing is left over. Raises NotWritten if the disk is
    full, and ConfigError if another process made the folder meanwhile.
    """
    temporary = beside(folder)
    try:
        with disk.written(folder, lambda: _bytes(temporary.rglob("*"))):
            temporary.mkdir(parents=True)
            yield temporary
            as_usual(p for p in temporary.rglob("*") if p.is_file())
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            _into_place(temporary, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _into_place(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError as e:
        if folder.exists():
            raise ConfigError(f"{folder} was made by another process meanwhile; choose another") from e
        raise


def _bytes(paths: Iterable[Path]) -> int:
    return sum(p.stat().st_size for p in paths if p.is_file())


def left_over(folder: Path) -> list[Path]:
    """Returns the temporary files and folders of killed writers in `folder` and below, outermost first."""
    return sorted(p for p in folder.rglob(".*") if TEMPORARY.fullmatch(p.name))


def clean(folder: Path) -> None:
    """Removes what killed writers left in `folder` and below. Only for a folder that no other writes to."""
    for path in left_over(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def as_usual(paths: Iterable[Path]) -> None:
    """Gives the files this user's default permissions; safetensors makes them private to the owner."""
    for path in paths:
        probe = beside(path)
        probe.touch()
        path.chmod(probe.stat().st_mode)
        probe.unlink()


def sync(path: Path) -> None:
    """Flushes a file's content or a folder's names to disk (Windows cannot flush folders and need not)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Returns the file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        for block in blocks(f):
            digest.update(block)
    return digest.hexdigest()


def blocks(file: BinaryIO, n_bytes: float = math.inf) -> Iterator[bytes]:
    """Yields a file's next n_bytes, or all that are left, a megabyte at a time."""
    while block := file.read(int(min(n_bytes, 1 << 20))):
        n_bytes -= len(block)
        yield block


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes UTF-8, sorted, indented by two. Raises ValueError for NaN and infinity, which JSON lacks."""
    path.write_text(
        json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False), encoding="utf-8"
    )


def read_json(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the object in the file. Raises FormatError if it is missing, malformed or incomplete."""
    try:
        content = foreign.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"there is no {path}; restore it from a copy") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise FormatError(f"{path} is not JSON: {e}; restore it from a copy") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}, not an object with settings")
    if odd := [f"{name} = {value}" for name, value in _numbers(content) if not math.isfinite(value)]:
        raise FormatError(f"{path}: numbers must be finite, got {', '.join(odd[:5])}; restore or correct it")
    missing = [name for name in needed if name not in content]
    if missing:
        raise FormatError(
            f"{path} lacks {', '.join(missing)}: it is another file than it should be; restore it from a copy"
        )
    return content


def _numbers(content: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields every fraction in a JSON value, with its dotted name."""
    if isinstance(content, float):
        yield name, content
    elif isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from _numbers(value, f"{name}.{key}" if name else str(key))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors as safetensors, contiguous, each with its own storage."""
    save_file(
        {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}, path, {"format": "pt"}
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, on the CPU. Raises FormatError if it is damaged."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except (SafetensorError, OSError) as e:
        raise FormatError(f"{path} is not a whole safetensors file ({e}); restore it from a copy") from None


def refuse_pickle(folder: Path, wanted: str) -> None:
    """Raises FormatError, with the way out, if `folder` lacks the file `wanted`."""
    if (folder / wanted).is_file():
        return
    there = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
    if there:
        raise FormatError(
            f"{folder} holds {there[0]} and no {wanted}; a pickle file can run code when it is read, so it "
            "is not read here. "
            f"Open it in PEFT, if you trust it, and save_pretrained() again: that writes safetensors"
        )
    raise FormatError(f"{folder} has no {wanted}")
