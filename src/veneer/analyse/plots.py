"""Pictures, made from numbers that stand in results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TITLES = {"full": "full fine-tuning", "lora": "LoRA", "loraplus": "LoRA+", "prose": "English prose", "c": "C headers"}
COLOURS = {"full": "#d95f02", "lora": "#1b9e77", "loraplus": "#7570b3"}


def learning_vs_forgetting(rows: Sequence[Mapping[str, Any]], file: Path, noise: float) -> Path:
    """One panel a target: bits per byte on the target against bits per byte on known text, as strength is dialled.

    rows: as in the demo's results.json, with `dial`, a list of {strength, target_bpb, known_bpb} measured on test text.
    noise: differences below it are drawn as a grey cross around the base. Returns the PNG's path.
    """
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(row["target"] for row in rows))
    figure = Figure(figsize=(5.4 * len(targets), 4.6), layout="constrained")
    for panel, target in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets, strict=True):
        _panel(panel, [row for row in rows if row["target"] == target], noise)
        panel.set_title(f"learning {TITLES.get(target, target)}")
    figure.suptitle("Each line dials one adapter from off (star) to full strength (large dot) and beyond", fontsize=10, color="#555555")
    figure.savefig(file, dpi=150)
    return file


def _panel(panel: Any, rows: Sequence[Mapping[str, Any]], noise: float) -> None:
    for row in rows:
        dial = sorted(row["dial"], key=lambda point: point["strength"])
        x, y = [p["known_bpb"] for p in dial], [p["target_bpb"] for p in dial]
        colour = COLOURS.get(row["method"], "#444444")
        panel.plot(x, y, "-", color=colour, linewidth=1.5, label=f"{TITLES.get(row['method'], row['method'])}")
        panel.scatter(x, y, s=[70 if p["strength"] == 1 else 14 for p in dial], color=colour, zorder=3)
        for point in dial:
            if point["strength"] in (0.5, 1):
                at = (point["known_bpb"], point["target_bpb"])
                panel.annotate(f"{point['strength']:g}", at, textcoords="offset points", xytext=(6, 4), fontsize=8, color=colour)
    base = (rows[0]["known_bpb_before"], rows[0]["target_bpb_before"])
    panel.errorbar(*base, xerr=noise, yerr=noise, color="#999999", linewidth=1)
    panel.scatter(*base, marker="*", s=160, color="black", zorder=4, label="base model")
    panel.set_xlabel("known text, bits per byte  (further right: more forgotten)")
    panel.set_ylabel("new text, bits per byte  (lower: more learned)")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=9)
