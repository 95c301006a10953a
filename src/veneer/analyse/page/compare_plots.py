"""Pictures of a comparison: scores with intervals, the front of learning and forgetting, rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.analyse.page import figures
from veneer.analyse.page.figures import PALETTE
from veneer.tasks import Metric

CYCLE = ("full", "lora", "loraplus", "learned", "forgotten", "quiet", "muted", "ink")
MARKS = "osD^v<>P"
ROW, LONG = 0.2, 16  # inches of a row of the legend; characters of a name that needs half of it
Rows = Sequence[Mapping[str, Any]]


def _look(i: int) -> dict[str, Any]:
    """Returns colour and mark of the i-th contender; marks are hollow where the colours repeat."""
    look = {
        "color": PALETTE[CYCLE[i % len(CYCLE)]],
        "marker": MARKS[(i + i // len(CYCLE)) % len(MARKS)],
        "markersize": 5,
    }
    return look if i < len(CYCLE) else {**look, "markerfacecolor": PALETTE["paper"]}


def _legend(panel: Any) -> None:
    """Writes the contenders below the panel, and makes the figure higher for them."""
    labels = panel.get_legend_handles_labels()[1]
    columns = 2 if any(len(label) > LONG for label in labels) else 3
    width, height = panel.figure.get_size_inches()
    rows = -(-len(labels) // columns)
    panel.figure.set_size_inches(width, height + ROW * rows)
    figures.legend(panel, columns)


def scores(rows: Rows, metric: Metric) -> Any:
    """Plots the mean score of each contender with its interval, the best on top."""
    known = [(i, r) for i, r in enumerate(rows) if r["score"]]
    known.sort(key=lambda entry: -metric.cost(entry[1]["score"]["mean"]))
    figure = figures.blank((4.6, 0.9 + 0.34 * max(1, len(known))))
    panel = figure.subplots()
    for y, (i, row) in enumerate(known):
        score, look = row["score"], _look(i)
        if score["low"] is not None:
            panel.plot([score["low"], score["high"]], [y, y], "-", color=look["color"])
        panel.plot(row["values"], [y] * len(row["values"]), ".", color=PALETTE["quiet"], markersize=5)
        panel.plot([score["mean"]], [y], linestyle="none", **look)
    panel.set_yticks(range(len(known)), [row["label"] for _, row in known])
    panel.set_xlabel(f"{metric.words} on test text; {metric.better} is better")
    panel.margins(y=0.15)
    return figure


def front(rows: Rows, metric: Metric) -> Any:
    """Plots trainings of each length: known text on x, new text on y; thin lines are dials."""
    figure = figures.blank((5.4, 4.0))
    panel = figure.subplots()
    target, known = f"target_{metric.name}", f"known_{metric.name}"
    faint = 0.6 if len(rows) <= len(CYCLE) else 0.3
    for i, row in enumerate(rows):
        points, look = [p for p in row["front"] if p["known"] is not None], _look(i)
        for point in points:
            dial = sorted(point["points"], key=lambda p: p["strength"])
            x, y = [p[known] for p in dial], [p[target] for p in dial]
            panel.plot(x, y, "-", color=look["color"], linewidth=0.6, alpha=faint)
        if points:
            x, y = [p["known"] for p in points], [p["target"] for p in points]
            panel.plot(x, y, linestyle="--", linewidth=1, label=row["label"], **look)
    panel.set_xlabel(f"known text, {metric.words}  (forgetting)")
    panel.set_ylabel(f"new text, {metric.words}  ({metric.better}: more learned)")
    _legend(panel)
    return figure


def sensitivity(rows: Rows, metric: Metric) -> Any:
    """Plots the score on valid text over the rate, for rates that were trained in full."""
    figure = figures.blank((5.4, 3.6))
    panel = figure.subplots()
    for i, row in enumerate(rows):
        full = [(t["lr"], t["best"]) for t in row["tried"] if t["state"] == "finished"]
        early = [
            (t["lr"], t["last"]) for t in row["tried"] if t["state"] == "dropped" and t["last"] is not None
        ]
        look = _look(i)
        if full:
            panel.plot(*zip(*full, strict=True), linestyle="-", label=row["label"], **look)
        if early:
            panel.plot(*zip(*early, strict=True), "x", color=look["color"], markersize=4)
    panel.set_xscale("log", base=4)  # of rates a factor of two apart, every other one
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    panel.set_xlabel("learning rate")
    panel.set_ylabel(f"{metric.words} on valid text")
    panel.set_title("crosses: ended early, at their last evaluation")
    _legend(panel)
    return figure
