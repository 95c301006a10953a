"""Opens the picture or clip that a row names: a path, or bytes as Parquet files of datasets hold them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from veneer.data.row_files import Row
from veneer.errors import DataError


def opened(row: Row, column: str) -> BinaryIO:
    """Returns the file in a column, open for reading, its path in `name` if it has one.

    A relative path is looked for beside the row's file. Raises DataError, naming the row, if it is missing.
    """
    value = row.columns[column]
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return io.BytesIO(value["bytes"])
    value = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(value, str) or not value:
        raise DataError(f"{row.where}: {column!r} must be the path of a file, got {value!r}")
    path = Path(row.source).parent / value if row.source and not Path(value).is_absolute() else Path(value)
    try:
        return path.open("rb")
    except OSError as e:
        why = "does not exist" if isinstance(e, FileNotFoundError) else f"cannot be read ({e.strerror})"
        raise DataError(f"{row.where}: the {column} {path} {why}") from None
