"""Defines the errors that end a training early."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import NotWritten, VeneerError


class Interrupted(VeneerError):
    """A signal ended the training after a step, and what it had is saved; exit code 128 + signal, as
    shells have it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Diverged(VeneerError):
    """Loss or gradient stayed non-finite; the state of the last good step is saved in `folder`."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


class Unlike(VeneerError):
    """The processes of one training hold different parameters; nothing of the last step is saved."""


class NotSaved(NotWritten):
    """A checkpoint could not be written; the older ones are untouched."""


class Busy(VeneerError):
    """Another training writes to the folder."""
