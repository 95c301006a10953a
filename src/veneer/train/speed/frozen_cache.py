"""Caches the hidden states below the first adapted block on disk, by example, from their first use on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import disk
from veneer.errors import ConfigError, FormatError
from veneer.files import read_json, replacing, write_json
from veneer.sites.blocks import reach
from veneer.tasks import Task
from veneer.train.speed.compiling import eagerly
from veneer.train.speed.frozen_blocks import Prefix, skipping
from veneer.units import size

FOLDER = "frozen"  # in that of the run
KEY, HIDDEN, SUMS = "key.json", "hidden.raw", "sums.raw"


def check_room(out: Path, needed: int) -> None:
    """Raises ConfigError if the disk lacks room for so many bytes, those of an earlier cache counted in."""
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    free, held = shutil.disk_usage(there).free, _held(out / FOLDER)
    if needed - held > free:
        raise ConfigError(
            f"cache_frozen needs {size(needed)} in {out}, but {size(free)} are free;"
            " choose another out, or leave cache_frozen out"
        )


def _held(folder: Path) -> int:
    """Returns the bytes that the files take on the disk: fewer than their length while they fill."""
    found = [p.stat() for p in folder.glob("*.raw")]
    return sum(getattr(s, "st_blocks", 0) * 512 for s in found)


def forget(out: Path) -> None:
    """Deletes a run's cache."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


class Kept:
    """The hidden states of examples.

    Each is computed alone and without padding, so it depends on nothing else.

    A resumed training has the same bits, from the disk or computed again.
    """

    def __init__(
        self,
        model: nn.Module,
        prefix: Prefix,
        task: Task,
        examples: Sequence[Any],
        out: Path,
        key: Mapping[str, Any],
    ) -> None:
        """key: all that the hidden states depend on; a cache in out with another key is deleted.

        Raises ConfigError, and NotWritten if the disk lacks the room after all.
        """
        sizes = [task.size(e) for e in examples]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.model, self.prefix, self.task = model, prefix, task
        self._places = {
            id(e): (i, end - n, end) for i, (e, n, end) in enumerate(zip(examples, sizes, ends, strict=True))
        }
        self._examples = examples  # held, so that no other object gets the identity of one of them
        folder, size = out / FOLDER, prefix.bytes(ends[-1])
        own = {**key, "first": prefix.first, "width": prefix.width, "dtype": str(prefix.dtype), "bytes": size}
        if _read(folder / KEY) != own:
            forget(out)
        check_room(out, size)
        folder.mkdir(exist_ok=True)
        disk.reserve(folder / HIDDEN, size)
        disk.reserve(folder / SUMS, 8 * len(examples))
        hidden = torch.from_file(str(folder / HIDDEN), shared=True, size=size, dtype=torch.uint8)
        self._hidden = hidden.view(prefix.dtype).view(-1, prefix.width)
        self._sums = torch.from_file(str(folder / SUMS), shared=True, size=len(examples), dtype=torch.int64)
        with replacing(folder / KEY) as (temporary,):
            write_json(temporary, own)

    @contextmanager
    def passing(self, examples: Sequence[Any], width: int) -> Iterator[None]:
        """Within the block the model reads a batch of these examples, `width` wide, without its frozen
        blocks."""
        device = next(self.model.parameters()).device
        # Zeros for padding, which no label sees.
        hidden = torch.zeros(len(examples), width, self.prefix.width, dtype=self.prefix.dtype)
        for row, example in enumerate(examples):
            own = self.of(example)
            hidden[row, : len(own)] = own
        with skipping(self.prefix, hidden.to(device)):
            yield

    def of(self, example: Any) -> Tensor:
        """Returns the hidden states (size, width), from the disk if they are there and whole."""
        i, begin, end = self._places[id(example)]
        rows = self._hidden[begin:end]
        if int(self._sums[i]) != _sum(rows):
            rows.copy_(self._computed(example))
            self._sums[i] = _sum(rows)
        return rows

    @torch.no_grad()
    def _computed(self, example: Any) -> Tensor:
        device = next(self.model.parameters()).device
        batch = {k: v.to(device) for k, v in self.task.collate([example]).items()}
        with eagerly():
            first = self.prefix.stack[self.prefix.first]
            found: Tensor = reach(self.model, first, self.task.inputs(batch))
        return found[0]


def _sum(rows: Tensor) -> int:
    """Returns the sum of all bytes plus one, as an empty file has sum 0."""
    return int(rows.view(torch.uint8).sum(dtype=torch.int64)) + 1


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(FormatError, OSError):
        return dict(read_json(path))
    return None
