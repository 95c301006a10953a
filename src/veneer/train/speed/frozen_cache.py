"""What leaves the frozen blocks for every window of a training, on disk from the first time that it was asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.data.pack import Window, collate, n_tokens
from veneer.errors import ConfigError, FormatError
from veneer.files import read_json, replacing, write_json
from veneer.sites.blocks import reach
from veneer.train.speed.compiling import eagerly
from veneer.train.speed.frozen_blocks import Prefix, skipping
from veneer.units import size

FOLDER = "frozen"  # in that of the run
KEY, HIDDEN, SUMS = "key.json", "hidden.raw", "sums.raw"


def check_room(out: Path, needed: int) -> None:
    """Raises ConfigError if the disk has no room for so many bytes beside what is there of them already."""
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    free, held = shutil.disk_usage(there).free, _held(out / FOLDER)
    if needed - held > free:
        raise ConfigError(
            f"cache_frozen needs {size(needed)} in {out}, but {size(free)} are free;"
            " choose another out, or leave cache_frozen out"
        )


def _held(folder: Path) -> int:
    """Bytes that the files take on the disk, which are fewer than their length while they fill."""
    found = [p.stat() for p in folder.glob("*.raw")]
    return sum(getattr(s, "st_blocks", 0) * 512 for s in found)


def forget(out: Path) -> None:
    """Deletes what a run has kept."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


class Kept:
    """The hidden states of windows, by window. Each is computed alone and without padding, so that it depends on nothing else:
    a training that is resumed has the same bits, from the disk or computed once more."""

    def __init__(
        self,
        model: nn.Module,
        prefix: Prefix,
        windows: Sequence[Window],
        out: Path,
        key: Mapping[str, Any],
        *,
        pad: int = 0,
    ) -> None:
        """key: all that the hidden states depend on; what lies in out for another key is deleted. Raises ConfigError."""
        lengths = [n_tokens([w]) for w in windows]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self.model, self.prefix, self.pad = model, prefix, pad
        self._places = {
            id(w): (i, end - n, end) for i, (w, n, end) in enumerate(zip(windows, lengths, ends, strict=True))
        }
        self._windows = windows  # held, so that no other window gets the identity of one of them
        folder, size = out / FOLDER, prefix.bytes(ends[-1])
        own = {**key, "first": prefix.first, "width": prefix.width, "dtype": str(prefix.dtype), "bytes": size}
        if _read(folder / KEY) != own:
            forget(out)
        check_room(out, size)
        folder.mkdir(exist_ok=True)
        hidden = torch.from_file(str(folder / HIDDEN), shared=True, size=size, dtype=torch.uint8)
        self._hidden = hidden.view(prefix.dtype).view(-1, prefix.width)
        self._sums = torch.from_file(str(folder / SUMS), shared=True, size=len(windows), dtype=torch.int64)
        with replacing(folder / KEY) as (temporary,):
            write_json(temporary, own)

    @contextmanager
    def passing(self, windows: Sequence[Window], width: int) -> Iterator[None]:
        """Within the block the model reads a batch of these windows, `width` positions wide, without its frozen blocks."""
        device = next(self.model.parameters()).device
        hidden = torch.zeros(
            len(windows), width, self.prefix.width, dtype=self.prefix.dtype
        )  # nothing that is learned sees padding
        for row, window in enumerate(windows):
            own = self.of(window)
            hidden[row, : len(own)] = own
        with skipping(self.prefix, hidden.to(device)):
            yield

    def of(self, window: Window) -> Tensor:
        """(tokens, width): what leaves the frozen blocks, from the disk where it is there and whole."""
        i, begin, end = self._places[id(window)]
        rows = self._hidden[begin:end]
        if int(self._sums[i]) != _sum(rows):
            rows.copy_(self._computed(window))
            self._sums[i] = _sum(rows)
        return rows

    @torch.no_grad()
    def _computed(self, window: Window) -> Tensor:
        device = next(self.model.parameters()).device
        inputs = {k: v.to(device) for k, v in collate([window], self.pad).items() if k != "labels"}
        with eagerly():
            found: Tensor = reach(
                self.model, self.prefix.stack[self.prefix.first], {**inputs, "use_cache": False}
            )
        return found[0]


def _sum(rows: Tensor) -> int:
    """Of all bytes, and one more: 0 is what an empty file says."""
    return int(rows.view(torch.uint8).sum(dtype=torch.int64)) + 1


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(FormatError, OSError):
        return dict(read_json(path))
    return None
