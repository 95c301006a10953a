"""Draws the curves of docs/compression from the recorded figures.

python bench/_compress_pictures.py docs/compression
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from matplotlib.ticker import StrMethodFormatter

from veneer.analyse.page import figures
from veneer.analyse.page.figures import PALETTE

RESULTS = Path(__file__).parent / "results"
COLOURS = {
    "svd": PALETTE["line"],
    "lord": PALETTE["loraplus"],
    "svd_llm": PALETTE["lora"],
    "fisher": PALETTE["muted"],
    "allocate": PALETTE["forgotten"],
    "no_refine": PALETTE["forgotten"],
    "refine": PALETTE["quiet"],
    "auto": PALETTE["learned"],
}
NAMES = {"svd_llm": "svd-llm", "no_refine": "auto without refinement"}


def series(found: dict[str, float], pattern: str) -> dict[str, list[tuple[float, float]]]:
    """Points (keep, value) by method, for names that match the pattern with its groups method and keep."""
    made: dict[str, list[tuple[float, float]]] = {}
    for name, value in found.items():
        match = re.fullmatch(pattern, name)
        if match and match["method"] in COLOURS:
            made.setdefault(match["method"], []).append((int(match["keep"]) / 100, value))
    return {method: sorted(made[method]) for method in COLOURS if method in made}


def draw(bench: str, pattern: str, label: str, file: Path, dense: str = "", top: float = 0) -> None:
    """Plots the series of one record over keep: logarithmic, or up to `top` with the dense model's figure."""
    found = json.loads((RESULTS / f"{bench}.json").read_text(encoding="utf-8"))["figures"]
    with figures.style():
        figure = figures.blank((5.4, 3.4))
        panel = figure.subplots()
        for method, points in series(found, pattern).items():
            x, y = zip(*points, strict=True)
            if dense and min(y) > top:
                continue
            panel.plot(x, y, "-o", color=COLOURS[method], label=NAMES.get(method, method), markersize=4)
        if dense:
            panel.axhline(found[dense], color=PALETTE["quiet"], linestyle=":", label="dense")
            panel.set_ylim(0, top)
        else:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.set_xlabel("share of the layers' parameters that is kept")
        panel.set_ylabel(label)
        panel.legend(ncols=2)
        figures.keep(figure, file)


def main() -> None:
    folder = Path(sys.argv[1])
    excess = r"(?P<method>\w+)_excess_keep(?P<keep>\d+)"
    draw("compress", excess, "excess bits per byte", folder / "builtin.png")
    perplexity = r"real_(?P<method>\w+)_keep(?P<keep>\d+)_perplexity"
    label = "perplexity of English text"
    draw("compress_real", perplexity, label, folder / "smollm2.png", "real_dense_perplexity", 30)


if __name__ == "__main__":
    main()
