"""Figures made from the numbers in results.json and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.analyse.page import figures
from veneer.analyse.page.figures import PALETTE
from veneer.tasks import Metric

TITLES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "loraplus": "LoRA+",
    "dora": "DoRA",
    "prose": "English prose",
    "c": "C headers",
}
COLOURS = {name: PALETTE[name] for name in ("full", "lora", "loraplus")}
MARKED = 160  # most points of a loss curve; more are averaged in groups


def learning_vs_forgetting(
    rows: Sequence[Mapping[str, Any]], file: Path, noise: float, metric: Metric
) -> Path:
    """Plots the metric on the target against known text over the strength, one panel per target.

    rows: as in the demo's results.json, with `dial`, the metric by strength on test text. noise: half the
    size of a grey cross around the base. Returns the path of the PNG.
    """
    targets = list(dict.fromkeys(row["target"] for row in rows))
    with figures.style():
        figure = figures.blank((5.4 * len(targets), 4.6))
        for panel, target in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets, strict=True):
            dialled(panel, [row for row in rows if row["target"] == target], noise, metric)
            panel.set_title(f"learning {TITLES.get(target, target)}")
        figure.suptitle(
            "Each line is one adapter from strength 0 (star) past full strength (large dot)", fontsize=10
        )
        figures.legend(panel, 4)
        figures.keep(figure, file)
    return file


def one_target(rows: Sequence[Mapping[str, Any]], noise: float, metric: Metric) -> Any:
    """Plots the rows of one target."""
    figure = figures.blank((4.6, 3.8))
    panel = figure.subplots()
    dialled(panel, rows, noise, metric)
    figures.legend(panel)
    return figure


def dialled(panel: Any, rows: Sequence[Mapping[str, Any]], noise: float, metric: Metric) -> None:
    """Draws the dial of every row as a line: known text on x, new text on y."""
    known, target = f"known_{metric.name}", f"target_{metric.name}"
    for row in rows:
        dial = sorted(row["dial"], key=lambda point: point["strength"])
        x, y = [p[known] for p in dial], [p[target] for p in dial]
        colour = COLOURS.get(row["method"], PALETTE["muted"])
        panel.plot(
            x, y, "-", color=colour, linewidth=1.5, label=f"{TITLES.get(row['method'], row['method'])}"
        )
        panel.scatter(x, y, s=[70 if p["strength"] == 1 else 14 for p in dial], color=colour, zorder=3)
    base = (rows[0][f"{known}_before"], rows[0][f"{target}_before"])
    panel.errorbar(*base, xerr=noise, yerr=noise, color=PALETTE["quiet"], linewidth=1)
    panel.scatter(*base, marker="*", s=160, color=PALETTE["ink"], zorder=4, label="base model")
    panel.set_xlabel(f"known text, {metric.words} ({_side(metric)}: forgotten)")
    panel.set_ylabel(f"new text, {metric.words} ({metric.better}: learned)")


def _side(metric: Metric) -> str:
    """Returns the side of a horizontal axis on which the metric is worse."""
    return "right" if metric.lower_is_better else "left"


def training_loss(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Plots the loss of every step, and its running mean; lines: of metrics.jsonl."""
    steps = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    x, y = [s for s, _ in steps], [v for _, v in steps]
    every = max(1, len(x) // MARKED)
    figure = figures.blank()
    panel = figure.subplots()
    bins = [_mean(y[i : i + every]) for i in range(0, len(y), every)]
    panel.plot(
        x[::every],
        bins,
        color=PALETTE["quiet"],
        linewidth=0.9,
        label="each step" if every == 1 else f"each {every} steps",
    )
    half = max(2, len(y) // 20)
    smooth = [_mean(y[max(0, i - half) : i + half + 1]) for i in range(0, len(y), every)]
    panel.plot(x[::every], smooth, color=PALETTE["ink"], label=f"mean of {2 * half + 1} steps")
    panel.set_xlabel("step")
    panel.set_title("training loss, mean over labels")
    figures.legend(panel)
    return figure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def evaluations(lines: Sequence[Mapping[str, Any]], results: Mapping[str, Any], metric: Metric) -> Any:
    """Plots the metric on valid, test and known text over steps; a dotted line marks the kept step."""
    measured = [line for line in lines if f"valid_{metric.name}" in line]
    figure = figures.blank()
    panel = figure.subplots()
    for word, colour in (("valid", "learned"), ("known", "forgotten")):
        key = f"{word}_{metric.name}"
        points = [(line["step"], line[key]) for line in measured if key in line]
        panel.plot(
            *zip(*points, strict=True), "o-", color=PALETTE[colour], markersize=4, label=f"{word} text"
        ) if points else None
    best = results.get("best_step")
    if "test" in results.get("after", {}) and best is not None:
        ends = [results[k]["test"] for k in ("before", "after")]
        panel.plot([0, best], ends, "s", **_hollow("learned"), label="test text, before and after")
    if best is not None:
        panel.axvline(best, color=PALETTE["muted"], linestyle=":", linewidth=1)
    panel.set_xlabel("step" if best is None else f"step  (dotted: {best}, the kept step)")
    panel.set_title(figures.wrapped(f"{metric.words}; {metric.better} is better"))
    panel.margins(y=0.12)
    figures.legend(panel)
    return figure


def _hollow(colour: str) -> dict[str, Any]:
    return {
        "markerfacecolor": PALETTE["paper"],
        "markeredgecolor": PALETTE[colour],
        "markersize": 7,
        "linestyle": "none",
    }


def training_path(lines: Sequence[Mapping[str, Any]], metric: Metric) -> Any:
    """Plots the path of the training: known text on x, valid text on y, one dot per evaluation."""
    known, valid = f"known_{metric.name}", f"valid_{metric.name}"
    measured = [line for line in lines if valid in line and known in line]
    x, y = [line[known] for line in measured], [line[valid] for line in measured]
    figure = figures.blank()
    panel = figure.subplots()
    panel.plot(x, y, "o-", color=PALETTE["learned"], markersize=4)
    panel.scatter(x[:1], y[:1], marker="*", s=160, color=PALETTE["ink"], zorder=4)
    wanted = dict.fromkeys((0, len(x) - 1, len(x) // 2))
    panel.set_xlabel(f"known text, {metric.words}  ({_side(metric)}: forgotten)")
    panel.set_ylabel(f"valid text, {metric.words}")
    panel.set_title(f"{'down' if metric.lower_is_better else 'up'}: learned; {_side(metric)}: forgotten")
    panel.margins(x=0.18, y=0.14)
    figures.named(panel, [(x[i], y[i], f"step {measured[i]['step']}" if i else "base") for i in wanted])
    return figure


def dial(points: Sequence[Mapping[str, Any]], chosen: float, metric: Metric) -> Any:
    """Plots the change of the metric against the base, in percent, over the strength of the adapter.

    Plots the metric itself if the base's is 0.
    """
    base = next(p for p in points if p["strength"] == 0)
    share = bool(base[f"target_{metric.name}"])
    figure = figures.blank()
    panel = figure.subplots()
    panel.axhline(0, color=PALETTE["muted"], linewidth=1)
    for key, word, colour in (
        (f"target_{metric.name}", "new text", "learned"),
        (f"known_{metric.name}", "known text", "forgotten"),
    ):
        if base.get(key) is not None and (base[key] or not share):
            y = [100 * (p[key] / base[key] - 1) if share else p[key] for p in points]
            panel.plot(
                [p["strength"] for p in points], y, "o-", color=PALETTE[colour], markersize=4, label=word
            )
    panel.axvline(chosen, color=PALETTE["muted"], linestyle=":", linewidth=1)
    panel.set_xticks([p["strength"] for p in points])
    panel.set_xlabel(f"strength of the adapter  (dotted: {chosen:g}, recommended)")
    against = " against the base, %" if share else ""
    panel.set_title(figures.wrapped(f"{metric.words}{against}; {metric.better} is better"))
    figures.legend(panel)
    return figure


def answers(points: Sequence[Mapping[str, Any]], asked: int, metric: Metric) -> Any:
    """Plots right answers above the metric on known text, over the strength of the adapter."""
    known, x = f"known_{metric.name}", [p["strength"] for p in points]
    figure = figures.blank((4.2, 4.2))
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(x, [p["right"] for p in points], "o-", color=PALETTE["learned"], markersize=4)
    above.set_ylim(-0.04 * asked, 1.04 * asked)
    above.set_title(f"right answers of {asked}")
    below.plot(x, [p[known] for p in points], "o-", color=PALETTE["forgotten"], markersize=4)
    below.set_title(f"known text, {metric.words}; {metric.better} is better")
    below.margins(y=0.15)
    below.set_xticks(x)
    below.set_xlabel("strength of the adapter")
    return figure
