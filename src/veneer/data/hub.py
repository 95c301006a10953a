"""Hugging Face datasets into rows: folders as save_to_disk writes them, and names on the hub, NAME[:CONFIG][:SPLIT]."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from veneer.data.row_files import Row, checked
from veneer.data.tables import Entry, bare
from veneer.errors import DataError, suggest

NAME = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<one>[^:\[]+(?:\[[^\]]*\])?))?(?::(?P<two>[^:\[]+(?:\[[^\]]*\])?))?"
)
# What the splits of a dataset are called that belong to a part of a run.
SPLITS = {"train": ("train",), "valid": ("validation", "valid", "dev", "eval"), "test": ("test",)}


def is_folder(path: Path) -> bool:
    """Whether the folder is a dataset, or several as splits, that save_to_disk wrote."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def from_folder(path: Path, split: str, part: str) -> list[Row]:
    """The rows of a split, which is the one that belongs to the part of the run if it is "". Raises DataError."""
    name, found = folder(path, split, part)
    return checked(name, entries(name, found))


def folder(path: Path, split: str, part: str) -> tuple[str, Any]:
    """The name and the dataset of that split, whose rows stay on the disk. Raises DataError."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise DataError(f"{path} is no dataset that can be read ({_reason(e)})") from None
    if isinstance(found, datasets.DatasetDict):
        name = _split(str(path), found, split, part)
        return f"{path}:{name}", found[name]
    if split:
        raise DataError(f"{path} is one dataset without splits; leave :{split} out")
    return str(path), found


def from_hub(name: str, part: str) -> list[Row]:
    """The rows of a dataset on the Hugging Face hub, or of it in the hub's cache. Raises DataError."""
    own, found = on_hub(name, part)
    return checked(own, entries(own, found))


def on_hub(name: str, part: str, **options: bool) -> tuple[str, Any]:
    """The name with its split, and the dataset. options: of datasets.load_dataset, such as streaming=True. Raises DataError.

    Of NAME:X, X is a split if a part of a run usually has that name, such as train or test, and a configuration otherwise.
    """
    import datasets

    given = NAME.fullmatch(name)
    if given is None:
        raise DataError(f"{name!r} names no dataset; write NAME, NAME:SPLIT or NAME:CONFIG:SPLIT")
    one, two = given["one"], given["two"]
    usual = {s for names in SPLITS.values() for s in names}
    config, split = (
        (one, two) if two else (None, one) if one and one.partition("[")[0] in usual else (one, None)
    )
    try:
        found = datasets.load_dataset(given["id"], config, split=split, **options)
    except (OSError, ValueError, RuntimeError) as e:
        what = f"{name}: no such dataset could be had from the Hugging Face hub or its cache"
        raise DataError(
            f"{what} ({_reason(e)}); if it is a file or folder, there is none of that name"
        ) from None
    if split:
        return name, found
    own = _split(name, found, "", part)
    return f"{name}:{own}", found[own]


def _split(name: str, found: Mapping[str, Any], split: str, part: str) -> str:
    if split and split not in found:
        raise DataError(f"{name} has no split {split!r}{suggest(split, found)}")
    own = split or next((s for s in SPLITS.get(part, ()) if s in found), None)
    if own is None:
        raise DataError(
            f"{name} has no split for {part}; name one of its splits: {', '.join(f'{name}:{s}' for s in found)}"
        )
    return own


def entries(name: str, dataset: Any) -> Iterator[Entry]:
    """The rows of a dataset, whether it is held or streamed. Raises DataError for one without rows."""
    n = 0
    for n, row in enumerate(dataset.with_format(None), 1):
        yield f"{name} row {n}", partial(bare, row)
    if not n:
        raise DataError(f"{name} has no rows")


def _reason(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
