"""Style of figures, and their files: a PNG, and an SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.files import replacing

# A page sets the same names as CSS variables, with other colours in dark mode.
PALETTE = {
    "ink": "#1d2129",
    "muted": "#69707d",
    "line": "#d9dce2",
    "paper": "#fffffe",
    "learned": "#1868b7",
    "forgotten": "#c8500a",
    "quiet": "#9aa1ad",
    "full": "#d95f02",
    "lora": "#1b9e77",
    "loraplus": "#7570b3",
}
ROOM = 44  # characters of a title
DPI = 150  # of a PNG
SIZE = (4.2, 3.1)  # inches; at the width of a phone, letters are as large as the surrounding text
# Places of a word beside its point, in points, with the side of the word that is there.
BESIDE = ((8, 6, "left"), (8, -8, "left"), (-8, 6, "right"), (-8, -8, "right"), (0, 12, "center"))
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a name with two dollars in it is a name
    "text.color": PALETTE["ink"],
    "axes.edgecolor": PALETTE["muted"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.titlecolor": PALETTE["ink"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALETTE["line"],
    "grid.linewidth": 0.7,
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "figure.facecolor": PALETTE["paper"],
    "axes.facecolor": PALETTE["paper"],
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text, not outlines
}


@contextmanager
def style() -> Iterator[None]:
    """Draws and saves figures inside the block in the common style."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def blank(size: tuple[float, float] = SIZE) -> Any:
    """Returns an empty figure that makes room for its labels; size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def wrapped(text: str) -> str:
    """Returns a title in lines that a figure of the usual size has room for."""
    return "\n".join(textwrap.wrap(text, ROOM))


def legend(panel: Any, columns: int = 2) -> None:
    """Writes the legend of a panel below its figure, where it covers no line."""
    handles, words = panel.get_legend_handles_labels()
    panel.figure.legend(handles, words, loc="outside lower left", ncols=columns)


def named(panel: Any, places: Sequence[tuple[float, float, str]]) -> None:
    """Writes a word beside each point (x, y, word), the first ones first; leaves out words without room."""
    panel.figure.draw_without_rendering()
    look = {"textcoords": "offset points", "fontsize": 9, "va": "center", "color": PALETTE["muted"]}
    taken: list[Any] = []
    for x, y, word in places:
        for dx, dy, side in BESIDE:
            text = panel.annotate(word, (x, y), xytext=(dx, dy), ha=side, **look)
            box = text.get_window_extent()
            if _within(panel.bbox, box) and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _within(outer: Any, box: Any) -> bool:
    return bool(outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1)


def keep(figure: Any, file: Path) -> str:
    """Writes the PNG, completely or not at all, and returns the figure as an <svg> element."""
    import matplotlib

    _lay_out(figure)
    with replacing(file) as (temporary,):
        figure.savefig(temporary, dpi=DPI, format="png")
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": file.stem}):  # ids must differ between pictures of a page
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(drawn.getvalue(), file.stem)


def _lay_out(figure: Any) -> None:
    """Places a figure's panels for its PNG, once: with a layout engine, saving draws a figure twice."""
    engine, dpi = figure.get_layout_engine(), figure.dpi
    figure.set_dpi(DPI)
    try:
        engine.execute(figure)
    finally:
        figure.set_dpi(dpi)
    figure.set_layout_engine(None)


def _inline(svg: str, name: str) -> str:
    """Returns an SVG document as an element: no prolog, no namespaces, colours by name, width by the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1),
        count=1,
    )
    svg = re.sub(r' id="([\w.]*_\d+)"', rf' id="{name}-\1"', svg)
    for word, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{word})")
    return svg.strip()
