"""A row as a task reads it, before it is cut to a length."""

from __future__ import annotations

from typing import Any, NamedTuple

from veneer.data.row_files import Row


class Encoded(NamedTuple):
    """A row and its content, such as tokens. whole: the size that must fit; None if the row may be cut
    anywhere."""

    row: Row
    content: Any
    whole: int | None = None
