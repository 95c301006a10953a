"""Writes the report of a finished run again."""

from __future__ import annotations

from typing import Any

from veneer.runs.report import report as report


def text(found: dict[str, Any]) -> str:
    """Returns the page's path, below all that is missing from it."""
    return "\n".join([*found["missing"], f"report: {found['report']}"])
