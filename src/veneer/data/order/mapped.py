"""Windows in safetensors files, mapped into memory and read where they are used."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from veneer.data.pack import Segment, Window
from veneer.files import read_tensors


class Mapped(Sequence[Window]):
    """The windows of files, in order. A window is copied out of the file when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        """files: as `tasks.text.windows.as_tensors` makes them. Raises FormatError for a damaged file."""
        self._parts = [_Part(read_tensors(file)) for file in files]
        self._ends = list(accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, i: int) -> Window: ...
    @overload
    def __getitem__(self, i: slice) -> list[Window]: ...
    def __getitem__(self, i: int | slice) -> Window | list[Window]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        n = bisect_right(self._ends, i)
        return self._parts[n].window(i - (self._ends[n - 1] if n else 0))


class _Part:
    """The windows of one file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.fields = [tensors[name] for name in Segment._fields]
        self.lengths = tensors["lengths"]
        self.ends, self.last = self.lengths.cumsum(0), tensors["sizes"].cumsum(0)

    def __len__(self) -> int:
        return len(self.last)

    def window(self, i: int) -> Window:
        first, last = int(self.last[i - 1]) if i else 0, int(self.last[i])
        begin = int(self.ends[first - 1]) if first else 0
        lengths = self.lengths[first:last].tolist()
        end = begin + sum(lengths)
        columns = [field[begin:end].long().split(lengths) for field in self.fields]
        return tuple(Segment(*one) for one in zip(*columns, strict=True))


class Joined(Sequence[Any]):
    """Several sequences as one, without a copy."""

    def __init__(self, *parts: Sequence[Any]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = i + len(self) if i < 0 else i
        n = bisect_right(self._ends, i)
        if i < 0 or n == len(self._parts):
            raise IndexError(f"example {i} of {len(self)}")
        return self._parts[n][i - (self._ends[n - 1] if n else 0)]
