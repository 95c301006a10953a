"""Pieces of a page, as HTML in which whatever comes from users is text and nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template

# Letters that no page may hold, as the pictures that Unicode has of them.
CONTROLS = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"}


def escape(text: str) -> str:
    """Any text as HTML that shows it."""
    return html.escape(text.translate(CONTROLS))


def whole(name: str, parts: Iterable[str]) -> str:
    """A page that needs nothing but itself."""
    own = files("veneer.analyse.page")
    frame, css = (own.joinpath(name).read_text(encoding="utf-8") for name in ("report.html", "report.css"))
    return Template(frame).substitute(
        title=escape(name), css=css.rstrip(), body="\n".join(part for part in parts if part)
    )


def title(text: str, above: str) -> str:
    """What the page is about, under a small line."""
    return f"<header>{paragraph(above, 'sub')}<h1>{escape(text)}</h1></header>"


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it; nothing at all if nothing does."""
    there = [part for part in parts if part]
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *there, "</section>"]) if there else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; kind: its CSS class."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def tiles(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """(what, figure, small print, CSS class) as boxes with a large figure."""
    boxes = (
        f'<div class="tile {kind}"><dt>{escape(what)}</dt><dd><span class="big">{escape(figure)}</span>'
        f'<br><span class="small">{escape(small)}</span></dd></div>'
        for what, figure, small, kind in rows
    )
    return "\n".join(['<dl class="tiles">', *boxes, "</dl>"])


def picture(svg: str, label: str, caption: str) -> str:
    """An <svg> with words for who cannot see it, and a caption."""
    named = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return f"<figure>\n{named}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def pair(*parts: str) -> str:
    """Parts beside each other where there is room, else below each other."""
    there = [part for part in parts if part]
    return "\n".join(['<div class="pair">', *there, "</div>"]) if there else ""


def row(*parts: str) -> str:
    """Parts in a row of three where there is room."""
    return pair(*parts).replace('class="pair"', 'class="pair three"', 1)


def card(*parts: str) -> str:
    """Parts in a box."""
    return "\n".join(['<div class="card">', *parts, "</div>"])


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), *, numbers: int | None = None) -> str:
    """A table that scrolls by itself where it is too wide. numbers: the first column of figures, to the right of which all are."""
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


def facts(entries: Mapping[str, str]) -> str:
    """Names and what they are, in two columns."""
    rows = (f'<tr><th>{escape(k)}</th><td class="wrap">{escape(v)}</td></tr>' for k, v in entries.items())
    return "\n".join(['<div class="scroll"><table><tbody>', *rows, "</tbody></table></div>"])


def details(summary: str, *parts: str) -> str:
    """Parts that open when the summary is chosen."""
    return "\n".join([f"<details><summary>{escape(summary)}</summary>", *parts, "</details>"])


def listed(entries: Iterable[str]) -> str:
    """A list of plain texts."""
    return "\n".join(["<ul>", *(f"<li>{escape(e)}</li>" for e in entries), "</ul>"])


def command(text: str) -> str:
    """A line for the terminal."""
    return f'<pre class="command">{escape(text)}</pre>'


def continued(prompt: str, texts: Iterable[tuple[str, str]]) -> str:
    """A prompt and, below it, beside each other, (by whom, text) of those who went on from it."""
    ways = (f'<div><h3>{escape(by)}</h3><div class="text">{escape(text)}</div></div>' for by, text in texts)
    return card(f'<div class="text prompt">{escape(prompt)}</div>', '<div class="samples">', *ways, "</div>")


def tokens(pieces: Iterable[Sequence[object]]) -> str:
    """(text, whether it is learned) of every token, in a row; learned ones are marked."""
    made = []
    for text, learned in pieces:
        shown = escape(str(text).replace("\n", "↵\n"))
        made.append(
            f'<mark class="token">{shown}</mark>' if learned else f'<span class="token">{shown}</span>'
        )
    return f'<div class="text">{"".join(made)}</div>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
