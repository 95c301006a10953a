"""Checks the links of Markdown files or of a built site, anchors included: python tools/links.py site

Links to other sites are listed, not checked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


class Page(HTMLParser):
    """The targets of a page's links, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if name in ("href", "src") and value:
                self.targets.append(value)


def targets_of(path: Path) -> list[str]:
    """Returns the targets of the file's links."""
    text = path.read_text(encoding="utf-8")
    return Page(text).targets if path.suffix == ".html" else LINK.findall(CODE.sub("", text))


def anchors_of(path: Path) -> set[str]:
    """Returns the anchors of the file; for Markdown, those that GitHub and MyST generate from headings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".html":
        return Page(text).anchors
    return {
        re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-")
        for h in HEADING.findall(re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))
    }


def broken(files: Iterable[Path]) -> Iterator[str]:
    """Yields "FILE: TARGET: problem" for every link to a missing file or anchor."""
    for path in files:
        for target in targets_of(path):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            other = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if other.is_dir():
                other /= "index.html"
            if not other.exists():
                yield f"{path}: {target}: file is missing"
            elif (
                parts.fragment
                and other.suffix in (".html", ".md")
                and unquote(parts.fragment) not in anchors_of(other)
            ):
                yield f"{path}: {target}: anchor is missing"


def external(files: Iterable[Path]) -> list[str]:
    """Returns the links to other sites."""
    return sorted({t for path in files for t in targets_of(path) if urlsplit(t).scheme in ("http", "https")})


def main(folder: Path) -> int:
    """Checks all pages under `folder`, prints broken links, lists external ones; returns the exit code."""
    files = sorted(folder.rglob("*.html"))
    problems, others = list(broken(files)), external(files)
    print(
        "\n".join(
            [
                *problems,
                f"{len(files)} pages, {len(problems)} broken links; {len(others)} links to other sites, not"
                " checked:",
                *others,
            ]
        )
    )
    return 1 if problems or not files else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
