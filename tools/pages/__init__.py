"""Generates documentation pages from the code: command line, methods and Python interface."""

from __future__ import annotations

from pathlib import Path

from pages import api, cli, methods


def write(folder: Path, notes: Path) -> None:
    """Writes the pages into `folder`; unchanged ones are not rewritten, so Sphinx rebuilds less.

    notes: folder of hand-written notes, NAME.md for the method, start or optimiser of that name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"cli.md": cli.page(), "methods.md": methods.page(notes), "api.md": api.page()}.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
