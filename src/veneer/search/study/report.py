"""Writes the page of a study in Markdown: verdicts on claims, scores and measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.models.short_names import SMOLLM2
from veneer.search.study.claims import FAILS, HOLDS, NOISE, UNKNOWN, Rows
from veneer.tasks import Metric

TEXTS = {
    "prose": "English prose, near the pretraining data",
    "c": "C headers, far from it",
    "ast": "Instructions: an expression, answered by its syntax tree",
    SMOLLM2: "SmolLM2-135M-Instruct (real weights): an expression, answered by its syntax tree",
}


OUTCOMES = {HOLDS: "hold", FAILS: "do not hold", NOISE: "lie inside the noise", UNKNOWN: "were not measured"}


def page(found: Mapping[str, Any], parts: Mapping[str, Rows], metric: Metric) -> str:
    """Returns the page. found: results.json of the study; parts: rows of every text by label."""
    lines = [
        *_head(found, SMOLLM2 in parts),
        f"{metric.words} of test text; {metric.better} is better.",
        "",
        *_table(
            ("source", "claim", "text", "outcome", "figures"),
            ((c["source"], c["claim"], c["text"], c["outcome"], c["figures"]) for c in found["claims"]),
        ),
        "",
        *([f"Missing parts: {', '.join(found['missing'])}.", ""] if found["missing"] else []),
        _counted(found["claims"]),
    ]
    for name, rows in parts.items():
        lines += ["", f"## {TEXTS.get(name, name)}", "", f"![scores]({name}-scores.png)", ""]
        lines += [f"![learning and forgetting]({name}-front.png)", "", *_scores(rows), "", *_measures(rows)]
        lines += (
            ["", *_profiles(rows)] if any(row["measures"].get("profile") for row in rows.values()) else []
        )
        answers = {label: row["measures"].get("answers") for label, row in rows.items()}
        lines += ["", *_answers(answers)] if any(answers.values()) else []
    return "\n".join(lines) + "\n"


def _head(found: Mapping[str, Any], real: bool) -> list[str]:
    """Returns title and first lines. real: of the part on real weights."""
    title, words = "Learning against forgetting: claims of the papers", "measured"
    size = "quick form" if found["quick"] else "full form"
    of, protocol, command = f"The built-in model, {size}.", "protocol", "veneer study"
    if real:
        words, of, protocol = "on SmolLM2", "SmolLM2-135M-Instruct, real weights.", "confirming"
        command = f"veneer study --part {SMOLLM2}"
    return [
        f"# {title}, {words}",
        "",
        f"{of} [The protocol]({protocol}.md) was fixed before the runs; each rule",
        f"is code (`search/study/claims.py`). `{command}` repeats everything. All scores are",
    ]


def _answers(found: Mapping[str, Mapping[str, float] | None]) -> list[str]:
    """Returns exact answers, and unique ones among samples of a prompt, right and wrong."""
    head = ("method", "exact", "samples right", "unique right", "unique wrong")
    made = [
        (label, f"{one['exact']:.0%}", f"{one['right']:.0%}", *_unique(one))
        for label, one in found.items()
        if one
    ]
    return _table(head, made)


def _unique(one: Mapping[str, float]) -> list[str]:
    return [f"{one[key]:.1f}" for key in ("unique_right", "unique_wrong")]


def _counted(claims: Sequence[Mapping[str, str]]) -> str:
    numbers = Counter(c["outcome"] for c in claims)
    counts = ", ".join(f"{numbers[kind]} {words}" for kind, words in OUTCOMES.items() if numbers[kind])
    note = "\nA claim without figures was not measured in this form." if numbers[UNKNOWN] else ""
    return f"Of {len(claims)} claims, {counts}.{note}"


def _scores(rows: Rows) -> list[str]:
    head = ("method", "rate", "score, 95 %", "forgotten", "steps to reference", "parameters")
    return _table(head, ((label, *_score(row)) for label, row in rows.items()))


def _score(row: Mapping[str, Any]) -> Iterable[str]:
    if not row["score"]:
        return ("", "diverged", "", "", "")
    score, forgotten, steps = row["score"], row["forgotten"], row["steps_to_reference"]
    spread = "" if score["low"] is None else f" ({score['low']:.4f} to {score['high']:.4f})"
    return (
        f"{row['lr']:.3g}",
        f"{score['mean']:.4f}{spread}",
        f"{forgotten['mean']:+.4f}" if forgotten else "–",
        f"{steps['mean']:.0f}" if steps else "never",
        f"{row['trainable_parameters']:,}",
    )


def _measures(rows: Rows) -> list[str]:
    head = ("method", "rank of 90 % energy", "attention", "MLP", "intruders", "CKA", "Procrustes")
    made = []
    for label, row in rows.items():
        m = row["measures"]
        if m:
            roles = (m["by_role"]["attention"], m["by_role"]["mlp"])
            ranks = (_number(v) for v in (m["energy_rank"], *roles, m["intruders"]))
            made.append((label, *ranks, f"{m['cka']:.4f}", f"{m['procrustes']:.4f}"))
    return _table(head, made)


def _profiles(rows: Rows) -> list[str]:
    """Returns the profiles along the base's ten leading directions, which no claim is judged by."""
    keys = ("retention", "adaptation", "cosine", "stable_rank", "outputs", "inputs", "drift", "drift_unit")
    head = ("method", *(key.replace("_", " ") for key in keys), "Gram")
    found = {label: row["measures"] for label, row in rows.items() if row["measures"].get("profile")}
    return _table(
        head, ((n, *(f"{m['profile'][k]:.3g}" for k in keys), f"{m['gram']:.3g}") for n, m in found.items())
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
