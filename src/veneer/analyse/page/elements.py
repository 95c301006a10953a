"""Builds parts of a page as HTML; text from users is always escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template

from veneer.foreign import visible


def escape(text: str) -> str:
    """Returns HTML that shows the text."""
    return html.escape(visible(text))  # control characters are invalid in HTML


def whole(name: str, parts: Iterable[str]) -> str:
    """Returns a self-contained page."""
    own = files("veneer.analyse.page")
    frame, css = (own.joinpath(name).read_text(encoding="utf-8") for name in ("report.html", "report.css"))
    return Template(frame).substitute(
        title=escape(name), css=css.rstrip(), body="\n".join(part for part in parts if part)
    )


def title(text: str, above: str) -> str:
    """Returns the title of the page under a small line."""
    return f"<header>{paragraph(above, 'sub')}<h1>{escape(text)}</h1></header>"


def section(title: str, *parts: str) -> str:
    """Returns a heading with its parts, or nothing if all parts are empty."""
    there = [part for part in parts if part]
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *there, "</section>"]) if there else ""


def paragraph(text: str, kind: str = "") -> str:
    """Returns a paragraph of plain text; kind: its CSS class."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def tiles(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """Returns boxes with a large figure; rows: (title, figure, small print, CSS class)."""
    boxes = (
        f'<div class="tile {kind}"><dt>{escape(what)}</dt><dd><span class="big">{escape(figure)}</span>'
        f'<br><span class="small">{escape(small)}</span></dd></div>'
        for what, figure, small, kind in rows
    )
    return "\n".join(['<dl class="tiles">', *boxes, "</dl>"])


def picture(svg: str, label: str, caption: str) -> str:
    """Returns an <svg> with a caption and a label for screen readers."""
    named = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return f"<figure>\n{named}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def pair(*parts: str) -> str:
    """Returns parts side by side, or stacked on a narrow screen."""
    there = [part for part in parts if part]
    return "\n".join(['<div class="pair">', *there, "</div>"]) if there else ""


def row(*parts: str) -> str:
    """Returns parts in a row of three, or stacked on a narrow screen."""
    return pair(*parts).replace('class="pair"', 'class="pair three"', 1)


def card(*parts: str) -> str:
    """Returns parts in a box."""
    return "\n".join(['<div class="card">', *parts, "</div>"])


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), *, numbers: int | None = None) -> str:
    """Returns a table that scrolls if it is too wide. numbers: index of the first column of numbers."""
    at = len(head) if numbers is None else numbers

    def line(cells: Sequence[str], tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{_class('n' if i >= at else 'wrap')}>{escape(c)}</{tag}>" for i, c in enumerate(cells)
            )
            + "</tr>"
        )

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return "\n".join(
        [
            '<div class="scroll"><table>',
            top,
            "<tbody>",
            *(line(r, "td") for r in rows),
            "</tbody></table></div>",
        ]
    )


def cells(made: Iterable[str]) -> str:
    """Returns a table's line of cells that are HTML already."""
    return "<tr>" + "".join(f'<td class="wrap">{cell}</td>' for cell in made) + "</tr>"


def table_of(lines: Iterable[str], head: Sequence[str]) -> str:
    """Returns a table of lines made by `cells`."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return "\n".join(
        [
            f'<div class="scroll"><table><thead><tr>{top}</tr></thead>',
            "<tbody>",
            *lines,
            "</tbody></table></div>",
        ]
    )


def facts(entries: Mapping[str, str]) -> str:
    """Returns names and values in two columns."""
    rows = (f'<tr><th>{escape(k)}</th><td class="wrap">{escape(v)}</td></tr>' for k, v in entries.items())
    return "\n".join(['<div class="scroll"><table><tbody>', *rows, "</tbody></table></div>"])


def details(summary: str, *parts: str) -> str:
    """Returns parts that open when the summary is clicked."""
    return "\n".join([f"<details><summary>{escape(summary)}</summary>", *parts, "</details>"])


def listed(entries: Iterable[str]) -> str:
    """Returns a list of plain texts."""
    return "\n".join(["<ul>", *(f"<li>{escape(e)}</li>" for e in entries), "</ul>"])


def command(text: str) -> str:
    """Returns a command line."""
    return f'<pre class="command">{escape(text)}</pre>'


def continued(prompt: str, texts: Iterable[tuple[str, str]]) -> str:
    """Returns a prompt above its continuations, side by side; texts: (author, continuation)."""
    ways = (f'<div><h3>{escape(by)}</h3><div class="text">{escape(text)}</div></div>' for by, text in texts)
    return card(f'<div class="text prompt">{escape(prompt)}</div>', '<div class="samples">', *ways, "</div>")


def tokens(pieces: Iterable[Sequence[object]]) -> str:
    """Returns tokens in a row, trained ones marked; pieces: (text, True if trained)."""
    made = []
    for text, learned in pieces:
        shown = escape(str(text).replace("\n", "↵\n"))
        made.append(
            f'<mark class="token">{shown}</mark>' if learned else f'<span class="token">{shown}</span>'
        )
    return f'<div class="text">{"".join(made)}</div>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
