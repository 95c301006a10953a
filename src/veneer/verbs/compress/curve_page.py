"""The curve of a compression as a table, a picture and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.analyse.page import figures
from veneer.analyse.page.figures import PALETTE
from veneer.ops.quant import FORMATS
from veneer.units import size

COLOURS = {
    "low rank": PALETTE["learned"],
    "magnitude": PALETTE["quiet"],
    "wanda": PALETTE["forgotten"],
    "int8": PALETTE["lora"],
    "nf4": PALETTE["loraplus"],
    "spqr": PALETTE["full"],
}
Point = Mapping[str, Any]


def table(points: Sequence[Point]) -> str:
    """Returns the points as a Markdown table."""
    head = "| model | keep | parameters | bytes | bits per byte | perplexity | prefill | token |"
    rows = [head, "|---|---|---|---|---|---|---|---|"]
    for p in points:
        keep = "" if p["keep"] is None else f"{p['keep']:g}"
        quality = f"{p['bits_per_byte']:.4f} | {p['perplexity']:.3f}"
        speed = f"{1e3 * p['prefill_seconds']:.1f} ms | {1e3 * p['decode_seconds']:.2f} ms"
        name = f"{p['name']} | {keep} | {p['parameters']:,} | {size(p['bytes_'])}"
        rows.append(f"| {name} | {quality} | {speed} |")
    return "\n".join(rows)


def advice(points: Sequence[Point]) -> str:
    """Returns in words whether quantisation beats low rank at the same bytes."""
    dense = next(p for p in points if p["name"] == "dense")
    ours = sorted((p for p in points if p["name"] == "low rank"), key=lambda p: -p["bytes_"])
    lines = []
    for q in (p for p in points if p["name"] in FORMATS):
        excess = q["bits_per_byte"] - dense["bits_per_byte"]
        worse = [p for p in ours if p["bytes_"] >= q["bytes_"] and p["bits_per_byte"] > q["bits_per_byte"]]
        if worse:
            at = ", ".join(format(p["keep"], "g") for p in worse)
            end = f": better than low rank at keep {at}, which takes more bytes and loses more."
        else:
            end = "; no measured low-rank model takes as many bytes and loses more."
        lines.append(f"{q['name']} takes {size(q['bytes_'])} and loses {excess:+.4f} bits per byte{end}")
    if ours:
        fast = min(ours, key=lambda p: p["prefill_seconds"])
        share = fast["prefill_seconds"] / dense["prefill_seconds"]
        lines.append(
            f"Low rank at keep {fast['keep']:g} takes {share:.2f} of the dense time for a prompt;"
            f" quantising its factors combines both."
        )
    return "\n".join(lines)


def picture(points: Sequence[Point], file: Path) -> Path:
    """Plots bits per byte over bytes and over a prompt's time, and returns the path of the PNG."""
    with figures.style():
        figure = figures.blank((9.0, 3.6))
        left, right = figure.subplots(1, 2)
        dense = next(p for p in points if p["name"] == "dense")
        for panel, key, unit in ((left, "bytes_", 1e6), (right, "prefill_seconds", 1e-3)):
            panel.axhline(dense["bits_per_byte"], color=PALETTE["line"], linewidth=1.2)
            panel.plot(dense[key] / unit, dense["bits_per_byte"], "*", color=PALETTE["ink"], label="dense")
            for name, colour in COLOURS.items():
                own = sorted((p for p in points if p["name"] == name), key=lambda p: p[key])
                x, y = [p[key] / unit for p in own], [p["bits_per_byte"] for p in own]
                if own and (panel is left or name in ("low rank", *FORMATS)):
                    panel.plot(x, y, "-o" if len(own) > 1 else "s", color=colour, label=name, markersize=4)
        left.set_xlabel("MB of weights")
        right.set_xlabel("ms for a prompt of 256 tokens")
        left.set_ylabel("bits per byte")
        _limit((left, right), points)
        left.legend()
        figures.keep(figure, file)
    return file


def _limit(panels: Sequence[Any], points: Sequence[Point]) -> None:
    """Cuts off the top where a method collapses, so that the others can be told apart."""
    low = min(p["bits_per_byte"] for p in points)
    top = max(p["bits_per_byte"] for p in points if p["name"] in ("dense", "low rank", *FORMATS))
    for panel in panels:
        panel.set_ylim(low - 0.05 * (top - low), low + 1.4 * (top - low) + 1e-6)
