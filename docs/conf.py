"""How Sphinx builds the site: hand-written Markdown, and pages made from the code before anything is read."""

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tools"))

import pages  # noqa: E402

project = "Veneer"
author = "the authors of Veneer"
copyright = "the authors of Veneer"
version = release = re.search(
    r'__version__ = "(.+?)"', (HERE.parent / "src/veneer/version.py").read_text(encoding="utf-8")
)[1]  # type: ignore[index]

extensions = ["myst_parser"]
myst_enable_extensions = ["linkify", "deflist"]
myst_linkify_fuzzy_links = False  # addresses alone, no words with dots in them
myst_heading_anchors = 3
exclude_patterns = ["notes"]
suppress_warnings = ["toc.not_included"]  # a page may come before its place in the list
smartquotes = False  # W' is no quotation
html_theme = "furo"
html_title = "Veneer"
html_copy_source = False
html_show_sourcelink = False
pygments_style = "default"


def setup(app: Any) -> None:
    """Writes the generated pages first."""
    pages.write(HERE / "generated", HERE / "notes")
