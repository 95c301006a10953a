"""Defines Veneer's errors; a message says where, what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VeneerError(Exception):
    """The base of all errors meant for the user. exit_code: the command line's."""

    exit_code = 1


class ConfigError(VeneerError):
    """A setting is unknown or impossible."""

    exit_code = 2


class SiteError(VeneerError):
    """A layer was not found, cannot be adapted, or was never used."""


class ShapeError(VeneerError):
    """Sizes do not fit together."""


class DataError(VeneerError):
    """Training or evaluation text is missing, unreadable or without a label."""


class FormatError(VeneerError):
    """A file is not what it should be, or does not belong to this model."""


class NotFinite(VeneerError):
    """A number that a step needs is infinite or NaN."""


class NotMergeable(VeneerError):
    """The change of weights cannot be written into the base, or would not survive there."""

    exit_code = 3


def suggest(name: str, known: Iterable[str], *, listed: bool = True) -> str:
    """Returns "; did you mean 'rank'?" for the nearest known name, or the known names (if `listed`)."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names) or 'none'}" if listed else ""


def first_few(names: Iterable[str], n: int = 5) -> str:
    """Returns "a, b, c and 12 more", enough of a list to recognise it."""
    every = list(names)
    return ", ".join(every[:n]) + (f" and {len(every) - n} more" if len(every) > n else "")
