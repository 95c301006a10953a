"""Writes the page of a demo: a comparison of its methods on every text, from results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from veneer import tasks
from veneer.analyse.numbers import moved, percent
from veneer.analyse.page import demo_answers, elements, plots, run_report
from veneer.files import read_json
from veneer.train.folder.layout import RESULTS
from veneer.units import count, duration, size

Rows = Sequence[Mapping[str, Any]]
METRIC = tasks.get(tasks.DEFAULT).METRIC  # of a demo's figures
TARGET, KNOWN = f"target_{METRIC.name}", f"known_{METRIC.name}"
ANSWERS = "answers"  # in results.json: the second act


def write(folder: Path) -> list[str]:
    """Writes report.html into the folder of a demo.

    Returns sentences about missing parts. Raises FormatError for damaged files.
    """
    results = read_json(folder / RESULTS)
    by_target = _by_target(results["methods"])
    noise = results[f"noise_{METRIC.name}"]
    wanted: run_report.Pictures = {
        f"dial-{t}": partial(plots.one_target, rows, noise, METRIC) for t, rows in by_target.items()
    }
    answers = results.get(ANSWERS)
    if answers:
        wanted["dial-answers"] = partial(plots.answers, answers["dial"], answers["asked"], METRIC)
    drawn, missing = run_report.draw(folder, wanted)
    title = "Learning and forgetting, method by method"
    ways = len({r["method"] for r in results["methods"]})
    says = (
        f"The built-in model, adapted for {results['steps']} steps by {ways} methods. All figures are"
        f" {METRIC.words}"
        f" on test text, used neither for training nor for choosing; {METRIC.better} is better."
        f" Differences below {noise:g} are noise at one seed."
    )
    parts = [
        elements.title(title, f"veneer demo · seed {results['seed']} · {folder}"),
        elements.paragraph(says, "lead"),
        *(elements.paragraph(sentence, "missing") for sentence in missing),
        demo_answers.section(answers, drawn.get("dial-answers"), METRIC) if answers else "",
        *(_target(target, rows, drawn.get(f"dial-{target}"), noise) for target, rows in by_target.items()),
        elements.section("Texts", elements.card(elements.table(*_texts(results["texts"]), numbers=2))),
        elements.section("Versions", elements.card(elements.facts(results["versions"]))),
    ]
    run_report.put(folder, elements.whole(title, parts))
    return missing


def _by_target(rows: Rows) -> dict[str, Rows]:
    return {t: [r for r in rows if r["target"] == t] for t in dict.fromkeys(r["target"] for r in rows)}


def _target(target: str, rows: Rows, svg: str | None, noise: float) -> str:
    """Returns the section of one text: picture, tables and samples."""
    name = plots.TITLES.get(target, target)
    caption = (
        "Each line is one adapter from strength 0 (star) past full strength (large dot)."
        " Down: learned. Right: forgotten."
    )
    picture = (
        elements.picture(svg, f"Learning of {name} and forgetting at several strengths", caption)
        if svg
        else ""
    )
    tables = [
        elements.table([make(r) for r in rows], head, numbers=1)
        for make, head in ((_moves, MOVES), (_use, USE))
    ]
    table = elements.card(tables[0], elements.paragraph(_ties(rows, noise), "small"), tables[1])
    first = rows[0]
    beside = elements.continued(
        first["prompt"],
        [("base", first["samples"]["before"]), *((_title(r), r["samples"]["after"]) for r in rows)],
    )
    return elements.section(
        f"Learning {name}",
        elements.pair(picture, table),
        elements.paragraph("One prompt, continued:", "sub"),
        beside,
    )


MOVES = ["method", "learned", "forgotten"]
USE = ["method", "best strength", "new, known there", "trained, on disk", "time"]


def _moves(r: Mapping[str, Any]) -> list[str]:
    changes = [{"before": r[f"{k}_before"], "after": r[f"{k}_after"]} for k in (TARGET, KNOWN)]
    return [_title(r), *(f"{moved(change)} {percent(change)}" for change in changes)]


def _use(r: Mapping[str, Any]) -> list[str]:
    at = next(p for p in r["dial"] if p["strength"] == r["recommended_strength"])
    dialled = [f"{at['strength']:g}", f"{at[TARGET]:.3f}, {at[KNOWN]:.3f}"]
    return [
        _title(r),
        *dialled,
        f"{count(r['trainable_parameters'])}, {size(r['adapter_bytes'])}",
        duration(r["seconds"]),
    ]


def _ties(rows: Rows, noise: float) -> str:
    """Returns a sentence about methods whose difference is below the noise."""
    close = [
        f"{_title(a)} and {_title(b)} in {word}"
        for i, a in enumerate(rows)
        for b in rows[i + 1 :]
        for word, key in (("learning", f"{TARGET}_after"), ("forgetting", f"{KNOWN}_after"))
        if abs(a[key] - b[key]) < noise
    ]
    return (
        f"Indistinguishable at one seed: {'; '.join(close)}."
        if close
        else "All differences are larger than the noise of one seed."
    )


def _title(r: Mapping[str, Any]) -> str:
    return plots.TITLES.get(r["method"], str(r["method"]))


def _texts(texts: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Returns (rows, head) of a table with a row for every part of every text."""
    found = [(name, part, facts) for name, parts in texts.items() for part, facts in _parts(parts)]
    keys = list(dict.fromkeys(k for _, _, facts in found for k in facts if k != "sha256"))
    rows = [[name, part, *(_fact(facts.get(k)) for k in keys)] for name, part, facts in found]
    return rows, ["text", "part", *keys]


def _parts(parts: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return list(parts.items()) if all(isinstance(v, Mapping) for v in parts.values()) else [("test", parts)]


def _fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)
