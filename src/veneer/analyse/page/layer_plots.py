"""Figures of changes by layer: singular values and effective ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from veneer.analyse.page import figures
from veneer.analyse.page.figures import PALETTE

KINDS = 8  # most kinds of layers with a line of their own
BLOCKS = 24  # most columns with numbers in the cells
Layers = Sequence[Mapping[str, Any]]


def place(site: str) -> tuple[str, int]:
    """Returns (kind, block): ("gate_proj", 3) for "model.layers.3.mlp.gate_proj"; -1 outside blocks."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site)
    parts = site.split(".")
    kind = ".".join(parts[-2:]) if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]
    return kind, int(number[1]) if number else -1


def by_kind(layers: Layers) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the layers by kind, in the model's order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        found.setdefault(place(layer["site"])[0], []).append(layer)
    return found


def singular_values(layers: Layers) -> Any:
    """Plots singular values of the change, largest first: medians over blocks, one line per kind of layer."""
    kinds = list(by_kind(layers).items())[:KINDS]
    figure = figures.blank()
    panel = figure.subplots()
    styles = [
        (colour, line) for line in ("-", "--") for colour in ("learned", "forgotten", "lora", "loraplus")
    ]
    for (kind, some), (colour, line) in zip(kinds, styles, strict=False):
        n = min(len(layer["values"]) for layer in some)
        middle = [median(layer["values"][i] for layer in some) for i in range(n)]
        look = {"color": PALETTE[colour], "linewidth": 1.4, "marker": "o" if n <= 16 else "", "markersize": 3}
        panel.plot(range(1, n + 1), middle, line, label=kind, **look)
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_formatter(_plain)
    # a range of less than a decade may hold no power of ten
    panel.yaxis.set_minor_formatter(_plain if high < 10 * low else "")
    panel.set_xlabel("index of the singular value")
    panel.set_title("singular values, median over blocks")
    figures.legend(panel)
    return figure


def _plain(value: float, position: int | None = None) -> str:
    return f"{value:g}"


def effective_ranks(layers: Layers) -> Any:
    """Plots a cell per layer: the effective rank, darker for changes large relative to the weight."""
    from matplotlib.patches import Rectangle

    kinds = by_kind(layers)
    columns = sorted({place(layer["site"])[1] for layer in layers})
    most = max(layer["relative"] for layer in layers) or 1.0
    figure = figures.blank((figures.SIZE[0], max(1.6, 0.33 * len(kinds) + 0.8)))
    panel = figure.subplots()
    for row, some in enumerate(kinds.values()):
        for layer in some:
            column = columns.index(place(layer["site"])[1])
            share = layer["relative"] / most
            look = {"color": PALETTE["learned"], "alpha": 0.08 + 0.6 * share, "linewidth": 0}
            panel.add_patch(Rectangle((column + 0.03, row + 0.05), 0.94, 0.9, **look))
            if len(columns) <= BLOCKS // 2:
                panel.text(
                    column + 0.5,
                    row + 0.5,
                    f"{layer['effective_rank']:.1f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                )
    panel.set(xlim=(0, len(columns)), ylim=(len(kinds), 0))
    panel.set_yticks([i + 0.5 for i in range(len(kinds))], list(kinds))
    every = max(1, len(columns) // 12)
    panel.set_xticks(
        [i + 0.5 for i in range(0, len(columns), every)], ["-" if c < 0 else str(c) for c in columns[::every]]
    )
    panel.set_xlabel("block")
    panel.set_title(figures.wrapped("effective rank; darker: larger relative to the weight"))
    panel.grid(False)
    panel.tick_params(length=0)
    for side in panel.spines.values():
        side.set_visible(False)
    return figure
