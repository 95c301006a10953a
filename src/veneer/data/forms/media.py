"""Pictures and clips of sound in rows: which column holds them, and how a folder of them gives rows."""

from __future__ import annotations

from typing import NamedTuple


class Media(NamedTuple):
    """The layout of a folder of files that needs no table.

    column: of the file; label: of its label or text. endings: of the files. beside: ending of the file
    of text with the same name; "" if the label is the name of the folder.
    """

    column: str
    label: str
    endings: tuple[str, ...]
    beside: str = ""


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CLIPS = (".wav",)
