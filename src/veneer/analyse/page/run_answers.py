"""The section of a run's page on single answers: which classes are mistaken, and the worst examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.analyse.page import elements
from veneer.analyse.page.run_record import RunRecord

BESIDE = 8  # questions side by side
MOST = 30  # classes of a table; more are unreadable


def asked(run: RunRecord) -> str:
    """Returns the section of short answers before and after, or nothing for texts without any."""
    found = run.results.get("answers")
    if not found:
        return ""
    rows = [[row["prompt"], row["before"], marked(row)] for row in found["rows"][:BESIDE]]
    says = (
        f"Of {found['asked']} questions of {found['text']} text the base answers {found['before']} exactly as"
        f" the text does, the adapted model {found['after']}. Answers are greedy, without drawing."
    )
    return elements.section(
        "Right answers",
        elements.paragraph(says),
        elements.card(elements.table(rows, ["question", "before", "after"])),
    )


def marked(row: Mapping[str, Any]) -> str:
    """Returns an answer with a mark, and the true one if it is wrong."""
    is_right = row.get("right", row["after"] == row["truth"])
    return f"{row['after']} ✓" if is_right else f"{row['after']} ✗ {row['truth']}"


def answers(run: RunRecord) -> str:
    """Returns the section, or nothing for a task whose answers are not looked at one by one."""
    found = run.results.get("examined")
    if not found:
        return ""
    n = f"{found['n']:,} {run.task.EXAMPLE}{'s' if found['n'] > 1 else ''}"
    return elements.section(
        "Answers",
        elements.paragraph(f"With the adapter at full strength, on {n} of {found['text']} text.", "sub"),
        _confusion(found.get("confusion")),
        _worst(found.get("worst") or ()),
    )


def _confusion(found: Mapping[str, Any] | None) -> str:
    """Returns a table of classes against answers; of many classes only the pairs mistaken most often."""
    if not found:
        return ""
    names, counts = found["names"], found["counts"]
    if len(names) > MOST:
        return _pairs(names, counts)
    rows = [[name, *map(str, row)] for name, row in zip(names, counts, strict=True)]
    return elements.card(
        elements.paragraph("Rows: the true class; columns: the answer.", "small"),
        elements.table(rows, ["", *names], numbers=1),
    )


def _pairs(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    wrong = [
        (n, names[i], names[j]) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n
    ]
    rows = [[truth, answer, str(n)] for n, truth, answer in sorted(wrong, reverse=True)[:MOST]]
    return elements.card(
        elements.paragraph("Classes mistaken most often.", "small"),
        elements.table(rows, ["true class", "answer", "times"], numbers=2),
    )


def _worst(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    head = [name for name in ("input", "truth", "answer", "loss") if name in rows[0]]
    made = [elements.cells([shown(r[name]) for name in head]) for r in rows]
    what = "examples with the largest loss" if "loss" in head else "wrong answers"
    return elements.details(f"{len(rows)} {what}", elements.card(elements.table_of(made, head)))


def shown(value: Any) -> str:
    """Returns HTML for a text, or for {"image": data URI} and {"audio": data URI}."""
    if isinstance(value, Mapping) and "image" in value:
        return f'<img src="{elements.escape(value["image"])}" alt="">'
    if isinstance(value, Mapping) and "audio" in value:
        return f'<audio controls src="{elements.escape(value["audio"])}"></audio>'
    return elements.escape(f"{value:.3g}" if isinstance(value, float) else str(value))
