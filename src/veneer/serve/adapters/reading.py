"""Reads adapters from folders that strangers may have written: files are checked before anything is
parsed.
"""

from __future__ import annotations

import copy
import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from veneer import files, foreign
from veneer.adapt.banks import entries
from veneer.adapt.peft import settings
from veneer.adapt.store import manifest, native, store
from veneer.adapt.store.loaded import Loaded
from veneer.errors import FormatError
from veneer.serve.adapters.version import Forms
from veneer.sites.finding.kinds import layers_of, site_for

FILES = (manifest.NAME, settings.CONFIG, settings.TENSORS, native.TENSORS)
JSON_BYTES, JSON_DEPTH, HEADER_BYTES = 16 << 20, 32, 8 << 20
Stamp = tuple[tuple[str, int, int, int], ...]


class Read(NamedTuple):
    """An adapter's content hash, its normal forms, and the adapter as it was read."""

    content: str
    forms: Forms
    loaded: Loaded


def stamp(folder: Path) -> Stamp:
    """Returns names, times and sizes of an adapter's files: equal while nobody wrote them."""
    found = []
    for name in FILES:
        try:
            s = (folder / name).stat()
        except OSError:
            continue
        found.append((name, s.st_mtime_ns, s.st_size, s.st_ino))
    return tuple(found)


def is_adapter(folder: Path) -> bool:
    """Returns True if the folder holds an adapter's description."""
    return any((folder / name).is_file() for name in (manifest.NAME, settings.CONFIG))


def content_of(folder: Path) -> str:
    """Returns the SHA-256 of an adapter's files: one hash, one function on one base."""
    parts = [f"{name} {files.sha256(folder / name)}" for name in FILES if (folder / name).is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_files(folder: Path, root: Path | None, most_bytes: int) -> None:
    """Raises FormatError for links out of `root`, special files, and files too large or too deep."""
    for name in FILES:
        path = folder / name
        if not path.exists() and not path.is_symlink():
            continue
        if root is not None and not path.resolve().is_relative_to(root.resolve()):
            raise FormatError(
                f"{name} must lie under the adapters' root; copy the file instead of linking it"
            )
        size = path.stat().st_size if path.exists() else 0
        if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
            raise FormatError(f"{name} must be a plain file")
        limit = JSON_BYTES if name.endswith(".json") else most_bytes
        if size > limit:
            raise FormatError(
                f"{name} must have at most {limit} bytes, got {size}; raise --max-adapter-bytes"
            )
        if name.endswith(".json"):
            _check_json(path)
        else:
            _check_header(path)


def _check_json(path: Path) -> None:
    depth = deepest = 0
    in_text = escaped = False
    for c in path.read_text(encoding="utf-8", errors="replace"):
        if in_text:
            in_text, escaped = escaped or c != '"', not escaped and c == "\\"
        elif c == '"':
            in_text, escaped = True, False
        elif c in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in "]}":
            depth -= 1
    if deepest > JSON_DEPTH:
        raise FormatError(f"{path.name} must be nested at most {JSON_DEPTH} deep, got {deepest}")


def _check_header(path: Path) -> None:
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > HEADER_BYTES:
            raise FormatError(f"{path.name} must have a header of at most {HEADER_BYTES} bytes, got {length}")
        if length > path.stat().st_size:
            raise FormatError(f"{path.name} is cut off; restore it from a copy")
        try:
            header = foreign.loads(f.read(length).decode())
        except ValueError:
            raise FormatError(f"{path.name} has no readable header; restore it from a copy") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path.name} has no readable header; restore it from a copy")


def check_ranks(forms: Forms, most: int) -> None:
    """Raises FormatError for ranks above `most`."""
    wide = {name: r for name, (_, f) in forms.items() if (r := f.factors.A.shape[0]) > most}
    if wide:
        name, r = next(iter(wide.items()))
        raise FormatError(f"rank must be at most {most}, got {r} at {name!r}; raise --max-rank")


class Reader:
    """Reads adapters for one model, without touching it, on a thread of its own."""

    def __init__(
        self,
        model: nn.Module,
        *,
        root: Path | None = None,
        most_bytes: int = 4 << 30,
        most_rank: int = 512,
        allow: Iterable[str] = (),
    ) -> None:
        self.model, self.root, self.most_bytes, self.most_rank = model, root, most_bytes, most_rank
        self.allow = tuple(allow)
        # Own modules with the same tensors: hooks come and go on the model while the copy is looked through.
        self.copy = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})

    def read(self, folder: Path) -> Read:
        """Returns a folder's adapter. Raises FormatError or ConfigError with everything that is wrong with
        it.
        """
        check_files(folder, self.root, self.most_bytes)
        content = content_of(folder)
        loaded = store.read(self.copy, folder, allow=self.allow)
        found = entries.entries(self.copy, {folder.name: loaded})[folder.name].forms
        check_ranks(found, self.most_rank)
        if content_of(folder) != content:
            raise FormatError("the adapter's files changed while they were read; try again")
        modules = layers_of(self.model)
        forms = {n: (site_for(n, modules[n]), form) for n, (_, form) in found.items()}
        return Read(content, forms, loaded)
