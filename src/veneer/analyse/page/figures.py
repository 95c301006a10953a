"""How pictures look and are kept: a PNG for people, and an SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.files import replacing

# Colours by what they stand for; a page sets the same names as CSS variables, others in the dark than in the light.
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
SIZE = (4.2, 3.1)  # inches: at the width of a phone letters are still as large as the text around
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
    "svg.fonttype": "none",  # letters stay letters
}


@contextmanager
def style() -> Iterator[None]:
    """Within the block figures are drawn, and kept, in the look of all others."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def blank(size: tuple[float, float] = SIZE) -> Any:
    """An empty figure, in inches, that makes room for its own labels."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def keep(figure: Any, file: Path) -> str:
    """Writes the PNG, whole or not at all: the same picture as an <svg> to stand in a page."""
    import matplotlib

    with replacing(file) as (temporary,):
        figure.savefig(temporary, dpi=150, format="png")
    figure.set_layout_engine("none")  # all is in its place
    drawn = io.StringIO()
    with matplotlib.rc_context(
        {"svg.hashsalt": file.stem}
    ):  # names inside differ from those of the page's other pictures
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(drawn.getvalue(), file.stem)


def _inline(svg: str, name: str) -> str:
    """An SVG document as an element: no prolog, nothing that names another place, colours by name, width by the page."""
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
