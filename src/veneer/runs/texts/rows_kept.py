"""Encoded rows as tensors and JSON, for measured texts and for work that a later process takes up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from veneer.data.row_files import Row
from veneer.data.tokens import Tokens
from veneer.tasks.base.encoded import Encoded


def as_tensors(every: Sequence[Encoded]) -> dict[str, Tensor]:
    """Returns the tokens of the rows: fields end to end, lengths of examples, examples per row.

    An empty row has -1 examples, a row without a whole -1.
    """
    some: list[Tokens] = [t for one in every for t in one.content or ()]
    empty = [torch.zeros(0, dtype=d) for d in (torch.int64, torch.bool, torch.int64)]
    fields = (
        [torch.cat([e, *column]) for e, column in zip(empty, zip(*some, strict=True), strict=True)]
        if some
        else empty
    )
    return {
        **dict(zip(Tokens._fields, fields, strict=True)),
        "lengths": torch.tensor([len(t.ids) for t in some], dtype=torch.int64),
        "sizes": torch.tensor([-1 if one.content is None else len(one.content) for one in every]),
        "wholes": torch.tensor([-1 if one.whole is None else one.whole for one in every]),
    }


def from_tensors(tensors: Mapping[str, Tensor], rows: Sequence[Row]) -> list[Encoded]:
    """Returns the rows of `as_tensors`."""
    lengths = tensors["lengths"].tolist()
    columns = [tensors[name].split(lengths) for name in Tokens._fields]
    every = iter([Tokens(*one) for one in zip(*columns, strict=True)])
    found = []
    for row, n, whole in zip(rows, tensors["sizes"].tolist(), tensors["wholes"].tolist(), strict=True):
        content = None if n < 0 else [next(every) for _ in range(n)]
        found.append(Encoded(row, content, None if whole < 0 else whole))
    return found


def rows_as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns rows ready for JSON."""
    return [asdict(row) for row in rows]


def rows_of_json(found: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Returns the rows of `rows_as_json`."""
    return [Row(**entry) for entry in found]
