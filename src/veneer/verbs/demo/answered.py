"""Writes the answers of the demo for people: the counts, the strength's curve and samples side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.analyse.numbers import percent
from veneer.analyse.page.demo_report import KNOWN, METRIC
from veneer.data.spread import spread
from veneer.units import size

SHOWN = 6
ASKED, ANSWER = 44, 28  # characters of the columns of samples


def text(found: Mapping[str, Any]) -> str:
    """Returns the section of results.json on answers as text."""
    n, at = found["asked"], found["recommended_strength"]
    points = found["dial"]
    base = points[0][KNOWN]
    forgotten = [percent({"before": base, "after": p[KNOWN]}) for p in points[1:]]
    lines = [
        f"\nWriting names in CamelCase: {n} questions on names that stand in no question to learn from",
        "",
        f"right answers: {found['right_before']} of {n} before, {found['right_after']} of {n} after"
        f" {found['steps']} steps of LoRA ({found['trainable_parameters']:,} trained parameters,"
        f" {size(found['adapter_bytes'])}, {found['seconds']:.0f} s)",
        "",
        _line("strength", [f"{p['strength']:g}" for p in points]),
        _line(f"right of {n}", [str(p["right"]) for p in points]),
        _line(f"known Python, {METRIC.words}", [f"{p[KNOWN]:.3f}" for p in points]),
        _line("forgotten", ["", *forgotten]),
        f"Recommended strength, chosen on other questions: {at:g}",
        "",
        *_samples(found["rows"]),
    ]
    return "\n".join(lines)


def _line(name: str, cells: list[str]) -> str:
    return f"{name:<30}{''.join(f'{cell:>10}' for cell in cells)}".rstrip()


def _samples(rows: list[Mapping[str, str]]) -> list[str]:
    """Returns lines of evenly spaced questions with the answers before and after."""
    head = f"{'question':<{ASKED}}{'before':<{ANSWER}}after"
    return [head, *(_sample(row) for row in spread(rows, SHOWN))]


def _sample(row: Mapping[str, str]) -> str:
    right = "right" if row["after"] == row["truth"] else f"wrong: {row['truth']}"
    asked, before = _cut(row["prompt"], ASKED - 2), _cut(row["before"], ANSWER - 2)
    return f"{asked:<{ASKED}}{before:<{ANSWER}}{_cut(row['after'], ANSWER)}  ({right})"


def _cut(text: str, most: int) -> str:
    """Returns a text in one line, cut to its beginning."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
