"""Writes the page of a comparison from its results.json."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from veneer.analyse.numbers import plain
from veneer.analyse.page import compare_plots, elements, run_report
from veneer.files import read_json
from veneer.tasks import Metric
from veneer.train.folder.layout import RESULTS
from veneer.units import count, duration, size

HEAD = ["method", "rate", "score", "95 %", "forgotten", "steps to reference", "time to it"]
USE = ["method", "trained", "adapter", "memory", "time", "rates within 1 %", "best strength"]
RATES = ["method", "rate", "outcome", "share", "valid", "why it ended"]


def write(folder: Path) -> list[str]:
    """Writes report.html into the folder of a comparison.

    Returns sentences about missing parts. Raises FormatError for damaged files.
    """
    found = read_json(folder / RESULTS, ("methods", "verdicts", "metric"))
    metric, rows = Metric(**found["metric"]), found["methods"]
    wanted: run_report.Pictures = {"scores": partial(compare_plots.scores, rows, metric)}
    if any(p["known"] is not None for row in rows for p in row["front"]):
        wanted["front"] = partial(compare_plots.front, rows, metric)
    wanted["rates"] = partial(compare_plots.sensitivity, rows, metric)
    drawn, missing = run_report.draw(folder, wanted)
    title = "Methods at their own best rates"
    parts = [
        elements.title(title, f"veneer compare · {found['model']} · {folder}"),
        elements.paragraph(summary(found), "lead"),
        *(elements.paragraph(sentence, "missing") for sentence in missing),
        elements.section(
            "Scores",
            _picture(drawn, "scores", "Mean over seeds with its 95 % interval; small dots are seeds."),
            elements.card(elements.table([score_row(r) for r in rows], HEAD, numbers=1)),
            elements.paragraph(_about_reference(found), "small"),
        ),
        elements.section("Differences", elements.listed(v["sentence"] for v in found["verdicts"])),
        elements.section("Learning and forgetting", _front(drawn)),
        elements.section("Cost", elements.card(elements.table([use_row(r) for r in rows], USE, numbers=1))),
        elements.section(
            "Rates",
            _picture(drawn, "rates", "Each method's own rates, chosen on valid text."),
            elements.details("every trial", elements.table(_trials(rows, metric), RATES, numbers=99)),
        ),
        elements.section("Notes", elements.listed(found["notes"])),
        elements.section("Versions", elements.card(elements.facts(found["versions"]))),
    ]
    run_report.put(folder, elements.whole(title, parts))
    return missing


def summary(found: Mapping[str, Any]) -> str:
    """Returns the outcome in two sentences."""
    metric, best = Metric(**found["metric"]), found["best"]
    if not best:
        return "No contender has a finished training: all trials diverged. Lower the rates by centre."
    n = found["seeds"]
    over = f"over {n} seeds" if n > 1 else "at one seed, which cannot tell noise from a difference"
    row = next(r for r in found["methods"] if r["label"] == best[0])
    first = f"{best[0]} has the best mean score, {row['score']['mean']:.4g} {metric.words} {over}"
    if len(found["methods"]) == 1:
        return f"{first}."
    if len(best) == 1:
        return f"{first}, and beats every other contender by more than the noise."
    return f"{first}; {', '.join(best[1:])} {'tie' if len(best) > 2 else 'ties'} with it."


def score_row(row: Mapping[str, Any]) -> list[str]:
    """Returns the cells of one contender under HEAD."""
    if not row["score"]:
        return [row["label"], "diverged at every rate", *[""] * 5]
    score, forgotten, n = row["score"], row["forgotten"], len(row["values"])
    steps, seconds = row["steps_to_reference"], row["seconds_to_reference"]
    missed = "" if row["reached"] == n else f" ({row['reached']} of {n} seeds)"
    return [
        row["label"] + (f" ({len(row['diverged_seeds'])} seeds diverged)" if row["diverged_seeds"] else ""),
        f"{row['lr']:.3g}{' (edge)' if row['on_edge'] else ''}",
        f"{score['mean']:.4g}",
        "one seed" if score["low"] is None else f"{score['low']:.4g} to {score['high']:.4g}",
        f"{forgotten['mean']:+.4g}" if forgotten else "–",
        f"{steps['mean']:.0f}{missed}" if steps else "not reached",
        duration(seconds["mean"]) if seconds else "",
    ]


def use_row(row: Mapping[str, Any]) -> list[str]:
    """Returns the cells of one contender under USE."""
    trained, memory, seconds = row["trainable_parameters"], row["memory_bytes"], row["seconds"]
    last = row["front"][-1] if row["front"] else None
    return [
        row["label"],
        count(trained) if trained else "–",
        size(row["adapter_bytes"]) if row["adapter_bytes"] else "–",
        size(memory) if memory else "–",
        duration(seconds) if seconds else "–",
        ", ".join(f"{lr:.3g}" for lr in row["rates_within_1_percent"]) or "–",
        f"{last['recommended']:g}" if last else "–",
    ]


def _about_reference(found: Mapping[str, Any]) -> str:
    wanted = found["reference"]
    if wanted["value"] is None:
        return ""
    gain = f"{100 * wanted['share']:.0f} % of the gain of {wanted['of']} on valid text"
    return f"Reference: {wanted['value']:.4g}, {gain}. Memory is a forecast of the peak over the loaded base."


def _front(drawn: Mapping[str, str]) -> str:
    caption = (
        "Each mark is a training of its own length at the chosen rate. A thin line is its dial, from the base"
        " to past full strength. The best strengths are chosen on valid text."
    )
    return _picture(drawn, "front", caption)


def _picture(drawn: Mapping[str, str], name: str, caption: str) -> str:
    return elements.picture(drawn[name], name, caption) if name in drawn else ""


def _trials(rows: list[Mapping[str, Any]], metric: Metric) -> list[list[str]]:
    return [
        [row["label"], plain(t["lr"]), t["state"], f"{t['share']:.3g}", _number(t["last"]), t["why"]]
        for row in rows
        for t in row["tried"]
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
