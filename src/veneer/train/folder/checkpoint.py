"""Checkpoints that are whole or not there: tensors and JSON with a SHA-256 manifest, under a temporary name
until synced.

    step-000120/  state.safetensors  meta.json  MANIFEST.json ({file: {sha256, bytes}}, written last)

Nothing is unpickled. What does not match its manifest is set aside as corrupt-.. and the one before it is
used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer import foreign
from veneer.files import as_usual, sha256, sync
from veneer.train.errors import NotSaved

STATE, META, MANIFEST = "state.safetensors", "meta.json", "MANIFEST.json"
NAME = re.compile(r"step-(\d{6,})")


class Checkpoint(NamedTuple):
    """A checkpoint in memory, saved after `step` steps."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Writes the checkpoint of a step into `folder`, in place of one that is there.

    Raises NotSaved, leaving nothing behind.
    """
    target = folder / f"step-{step:06d}"
    temporary = folder / f".tmp-{step}-{os.getpid()}"
    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    try:
        temporary.mkdir(parents=True)
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary / STATE)
        (temporary / META).write_text(json.dumps({**meta, "step": step}, sort_keys=True), encoding="utf-8")
        _write_manifest(temporary)
        if target.exists():
            _discard(target)
        temporary.rename(target)
        sync(folder)
    except Exception as e:  # safetensors raises its own error on a full disk, not OSError
        shutil.rmtree(temporary, ignore_errors=True)
        left = ", ".join(p.name for p in reversed(found(folder))) or "none"
        raise NotSaved(
            f"the checkpoint of step {step} ({n_bytes:,} bytes) could not be written to {target}: {e}; kept:"
            f" {left}"
        ) from e
    return target


def _write_manifest(folder: Path) -> None:
    files = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in (STATE, META)
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=1, sort_keys=True), encoding="utf-8")
    as_usual(folder / name for name in (STATE, META, MANIFEST))
    for name in (STATE, META, MANIFEST):
        sync(folder / name)
    sync(folder)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and what was found damaged on the way to it and renamed corrupt-.. .

    Half-written ones are deleted.
    """
    for rest in folder.glob(".tmp-*"):
        shutil.rmtree(rest, ignore_errors=True)
    damaged: list[str] = []
    for path in reversed(found(folder)):
        problem = damage(path)
        if problem is None:
            return load(path), damaged
        aside = path.with_name(f"corrupt-{path.name}-{int(time.time())}")
        path.rename(aside)
        damaged.append(f"{path.name} is damaged ({problem}) and set aside as {aside.name}")
    return None, damaged


def load(path: Path) -> Checkpoint:
    """A checkpoint that `damage` found nothing wrong with."""
    meta = foreign.loads((path / META).read_text(encoding="utf-8"))
    return Checkpoint(meta["step"], load_file(path / STATE), meta)


def damage(path: Path) -> str | None:
    """Returns the fault of a checkpoint, or None if every file has the bytes of the manifest."""
    try:
        manifest = foreign.loads((path / MANIFEST).read_text(encoding="utf-8"))
        entries = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest.items()}
        if set(entries) != {STATE, META}:
            return f"{MANIFEST} does not name exactly {STATE} and {META}"
        for name, (digest, n_bytes) in entries.items():
            if (path / name).stat().st_size != n_bytes or sha256(path / name) != digest:
                return f"{name} is not what {MANIFEST} says"
        step = foreign.loads((path / META).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        return f"unreadable: {type(e).__name__}: {e}"
    return None if path.name == f"step-{step:06d}" else f"it is the checkpoint of step {step}"


def found(folder: Path) -> list[Path]:
    """Checkpoints by step, whether valid or not."""
    return sorted(_steps(folder), key=lambda p: int(p.name[5:]))


def _steps(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (p for p in folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir())


def prune(folder: Path, keep: int, spared: Collection[int]) -> None:
    """Deletes all but the newest `keep` checkpoints and those of the spared steps."""
    for path in found(folder)[:-keep]:
        if int(path.name[5:]) not in spared:
            _discard(path)


def _discard(path: Path) -> None:
    aside = path.with_name(f".tmp-{path.name}-{time.time_ns()}")  # never half a checkpoint under a valid name
    path.rename(aside)
    shutil.rmtree(aside)
