"""Reads Hugging Face datasets: folders written by save_to_disk, and hub names, NAME[:CONFIG][:SPLIT]."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from veneer import network
from veneer.data.forms.shape import AS_IS, Shape
from veneer.data.row_files import Row, checked
from veneer.data.tables import Entry, without_nulls
from veneer.errors import DataError, suggest

NAME = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<one>[^:\[]+(?:\[[^\]]*\])?))?(?::(?P<two>[^:\[]+(?:\[[^\]]*\])?))?"
)
# The usual names of the split for each part of a run.
SPLITS = {"train": ("train",), "valid": ("validation", "valid", "dev", "eval"), "test": ("test",)}


def is_folder(path: Path) -> bool:
    """Tells if save_to_disk wrote the folder, as one dataset or as several splits."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def from_folder(path: Path, split: str, part: str, shape: Shape = AS_IS) -> list[Row]:
    """Returns the rows of a split; an empty `split` means the usual one for the part. Raises DataError."""
    name, found = open_folder(path, split, part)
    return checked(name, entries(name, found), shape)


def open_folder(path: Path, split: str, part: str) -> tuple[str, Any]:
    """Returns name and dataset of a split; its rows stay on disk. Raises DataError."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise DataError(f"{path}: unreadable as a dataset ({_reason(e)})") from None
    if isinstance(found, datasets.DatasetDict):
        name = _split(str(path), found, split, part)
        return f"{path}:{name}", found[name]
    if split:
        raise DataError(f"{path}: the dataset has no splits; remove :{split}")
    return str(path), found


def from_hub(name: str, part: str, shape: Shape = AS_IS) -> list[Row]:
    """Returns the rows of a dataset of the Hugging Face hub or its local cache. Raises DataError."""
    own, found = open_on_hub(name, part)
    return checked(own, entries(own, found), shape)


def open_on_hub(name: str, part: str, **options: bool) -> tuple[str, Any]:
    """Returns the name with its split, and the dataset. Raises DataError.

    In NAME:X, X is a split if it is a usual name of one (train, test, ..), else a configuration.
    options: of datasets.load_dataset, such as streaming=True.
    """
    import datasets

    given = NAME.fullmatch(name)
    if given is None:
        raise DataError(f"a dataset must be NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, got {name!r}")
    one, two = given["one"], given["two"]
    usual = {s for names in SPLITS.values() for s in names}
    config, split = (
        (one, two) if two else (None, one) if one and one.partition("[")[0] in usual else (one, None)
    )
    try:
        with network.hub(given["id"]):
            found = datasets.load_dataset(given["id"], config, split=split, **options)
    except (OSError, ValueError, RuntimeError) as e:
        raise DataError(
            f"{name}: not found on the Hugging Face hub or in its cache ({_reason(e)});"
            f" no file or folder has that name either"
        ) from None
    if split:
        return name, found
    own = _split(name, found, "", part)
    return f"{name}:{own}", found[own]


def _split(name: str, found: Mapping[str, Any], split: str, part: str) -> str:
    if split and split not in found:
        raise DataError(f"{name}: unknown split {split!r}{suggest(split, found)}")
    own = split or next((s for s in SPLITS.get(part, ()) if s in found), None)
    if own is None:
        raise DataError(
            f"{name}: no split is named for {part}; choose one: {', '.join(f'{name}:{s}' for s in found)}"
        )
    return own


def entries(name: str, dataset: Any) -> Iterator[Entry]:
    """Yields the rows of a dataset in memory or a streamed one. Raises DataError if it is empty."""
    n = 0
    for n, row in enumerate(dataset.with_format(None), 1):
        yield f"{name} row {n}", partial(without_nulls, row)
    if not n:
        raise DataError(f"{name}: the dataset has no rows")


def _reason(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
