"""Writes the demo's results for people: a table per text, its ties, samples and the next commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.analyse.page.demo_report import ANSWERS, KNOWN, METRIC, TARGET
from veneer.analyse.page.plots import TITLES
from veneer.analyse.page.run_report import REPORT
from veneer.train.folder.layout import RESULTS
from veneer.units import size
from veneer.verbs.demo import answered
from veneer.verbs.demo.judge import PROMPTS

PICTURE = "learning-vs-forgetting.png"


def text(results: Mapping[str, Any]) -> str:
    """Returns the results for people: tables, ties, samples and the next commands."""
    rows = results["methods"]
    parts = [
        table([r for r in rows if r["target"] == t], t, results[f"noise_{METRIC.name}"])
        for t in dict.fromkeys(r["target"] for r in rows)
    ]
    return "\n".join([*parts, answered.text(results[ANSWERS]), _next(rows, results[ANSWERS])])


def table(rows: Sequence[Mapping[str, Any]], target: str, noise: float) -> str:
    """Returns the rows of one target, with its ties and samples."""
    before = rows[0]
    lines = [
        f"\nLearning {TITLES[target]}: {METRIC.words} on text held out from training,"
        f" {before[f'{TARGET}_before']:.3f} before; on Python it knew, {before[f'{KNOWN}_before']:.3f}"
        " before",
        "",
        f"{'':<18}{'trained':>11}{'adapter':>11}{'learned':>16}{'forgotten':>16}{'seconds':>9}"
        "   dialled to (learned, forgotten)",
    ]
    lines += [_line(r) for r in rows]
    lines += [
        f"Differences below {noise} are noise at one seed: {_ties(rows, noise)}.",
        "",
        f"Prompt: {before['prompt']}",
    ]
    lora = next((r for r in rows if r["method"] == "lora"), before)
    lines += [
        f"  {name:<7} {_one_line(lora['samples'][key])}"
        for name, key in (("base", "before"), ("LoRA", "after"))
    ]
    return "\n".join(lines)


def _line(r: Mapping[str, Any]) -> str:
    """Returns one run as a line of the table."""
    at = next(p for p in r["dial"] if p["strength"] == r["recommended_strength"])
    moves = [
        f"{r[f'{k}_after']:>8.3f} {r[f'{k}_after'] / r[f'{k}_before'] - 1:>+7.1%}" for k in (TARGET, KNOWN)
    ]
    sizes = f"{r['trainable_parameters']:>11,}{size(r['adapter_bytes']):>11}"
    dialled = f"{at['strength']:g} ({at[TARGET]:.3f}, {at[KNOWN]:.3f})"
    return f"{TITLES[r['method']]:<18}{sizes}{''.join(moves)}{r['seconds']:>9.0f}   {dialled}"


def _ties(rows: Sequence[Mapping[str, Any]], noise: float) -> str:
    close = []
    for i, a in enumerate(rows):
        for b in rows[i + 1 :]:
            same = [
                w
                for w, k in (("learned", f"{TARGET}_after"), ("forgotten", f"{KNOWN}_after"))
                if abs(a[k] - b[k]) < noise
            ]
            if same:
                close.append(
                    f"{TITLES[a['method']]} and {TITLES[b['method']]} are alike in {' and '.join(same)}"
                )
    return "; ".join(close) or "no two methods are alike"


def _next(rows: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]) -> str:
    lora = next((r for r in rows if r["method"] == "lora"), rows[0])
    folder = Path(lora["folder"])
    return (
        f"\nPage: {folder.parent / REPORT}    Numbers: {folder.parent / RESULTS}\n"
        f"Next: veneer generate --adapter {folder}@{lora['recommended_strength']:g}"
        f" {PROMPTS[lora['target']]!r}\n"
        f"      veneer generate --adapter {asked['folder']} {asked['rows'][0]['prompt']!r}\n"
        f"      veneer inspect {folder}\n"
        f"      veneer fit --model YOUR_MODEL --data YOUR.jsonl --out runs/yours"
    )


def _one_line(text: str) -> str:
    return " / ".join(line.strip() for line in text.splitlines() if line.strip())[:110]
