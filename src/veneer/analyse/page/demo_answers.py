"""The section of a demo's page on questions with one right answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.analyse.numbers import percent
from veneer.analyse.page import elements
from veneer.analyse.page.run_answers import marked
from veneer.data.spread import spread
from veneer.tasks import Metric
from veneer.units import count, duration, size

SHOWN, WRONG = 8, 24  # questions side by side, and wrong answers in a fold


def section(found: Mapping[str, Any], svg: str | None, metric: Metric) -> str:
    """Returns the section: the counts, the strength's curve, and answers before and after side by side.

    found: as in the demo's results.json.
    """
    wrong = [row for row in found["rows"] if row["after"] != row["truth"]]
    caption = (
        "Above: right answers by strength. Below: the same strengths on Python the model knew,"
        f" {metric.words}; {'higher' if metric.lower_is_better else 'lower'} means more forgotten."
    )
    picture = elements.picture(svg, "Right answers and forgetting at every strength", caption) if svg else ""
    says = (
        f"One LoRA learns to write snake_case names in CamelCase, in {found['steps']} steps. It is asked"
        f" {found['asked']} names that stand in no question to learn from. An answer counts only if every"
        " letter is right."
    )
    return elements.section(
        "Answers that are right or wrong",
        elements.paragraph(says),
        elements.tiles(_tiles(found)),
        elements.pair(picture, elements.card(_strengths(found, metric))),
        elements.paragraph("Evenly spaced questions, before and after:", "sub"),
        elements.card(_beside(spread(found["rows"], SHOWN))),
        elements.details(
            f"{min(WRONG, len(wrong))} of {len(wrong)} wrong answers", elements.card(_beside(wrong[:WRONG]))
        )
        if wrong
        else "",
    )


def _tiles(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    n, before, after = found["asked"], found["right_before"], found["right_after"]
    trained = f"{size(found['adapter_bytes'])} on disk"
    return [
        ("right before", f"{before} of {n}", f"{before / n:.0%}", ""),
        ("right after", f"{after} of {n}", f"{after / n:.0%}", "learned" if after > before else "forgotten"),
        ("trained parameters", count(found["trainable_parameters"]), trained, ""),
        ("training", duration(found["seconds"]), f"{found['steps']} steps", ""),
    ]


def _strengths(found: Mapping[str, Any], metric: Metric) -> str:
    known = f"known_{metric.name}"
    base = found["dial"][0][known]
    rows = [
        [
            f"{p['strength']:g}",
            str(p["right"]),
            f"{p[known]:.3f}",
            percent({"before": base, "after": p[known]}) if p["strength"] else "",
        ]
        for p in found["dial"]
    ]
    at = f"Recommended strength, chosen on other questions: {found['recommended_strength']:g}."
    head = ["strength", "right", "known text", "forgotten"]
    return "\n".join([elements.table(rows, head, numbers=1), elements.paragraph(at, "small")])


def _beside(rows: list[Mapping[str, str]]) -> str:
    made = [[row["prompt"], row["before"], marked(row)] for row in rows]
    return elements.table(made, ["question", "before", "after"])
