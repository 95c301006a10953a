"""`veneer data check`: counts and compares the texts of a run, without the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import DataError, first_few
from veneer.runs.prepare import encoded_texts
from veneer.runs.texts import texts
from veneer.runs.texts.encoded import LeftOut, keep, pieces_of
from veneer.tasks.base.abilities import Surveyed, surveyed
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.survey import Survey
from veneer.train.loop.progress import Notes
from veneer.train.run import Run


def check(run: Run) -> Survey:
    """Counts and compares the texts that a run names. Raises the errors of unreadable texts."""
    notes = Notes()
    run, task, encoded = encoded_texts(texts.named(run), notes)
    task = surveyed(task, run.task)
    figures, wrong, kept = {}, [], {}
    for part, every in encoded.items():
        kept[part], left_out, found = _kept(every, task, part, notes)
        problems = task.problems(every)
        numbers = {problem: len(names) for problem, names in problems.items()}
        figures[part] = {**task.figures(every), **numbers, "left_out": left_out._asdict()}
        wrong += [*found, *(f"{part}: {task.problem(k, names)}" for k, names in problems.items() if names)]
    for part, leak in _leaks(encoded).items() if run.chooses else ():
        figures[part]["leaks"] = {"equal": len(leak.equal), "alike": len(leak.alike)}
        wrong += leak.sentences(part, [first_few(names) for names in leak])
    said = [note for note in notes.said if not note.endswith(texts.FLATTERS)]
    said += [
        f"{p}: {f['duplicates']} rows occur more than once" for p, f in figures.items() if f["duplicates"]
    ]
    pieces = [p for one in kept["train"] for p in pieces_of(one, task, run.window) * one.row.times]
    return Survey(figures, task.epoch(task.join(pieces), run.batch * run.accumulate), wrong, said)


def _kept(
    every: Sequence[Encoded], task: Surveyed, part: str, notes: Notes
) -> tuple[list[Encoded], LeftOut, list[str]]:
    """Returns the rows to use, those left out, and the problem if a training would refuse them."""
    try:
        return *keep(every, task, part, notes), []
    except DataError as problem:
        usable = [one for one in every if pieces_of(one, task, task.reading.window)]
        return usable, LeftOut([], [], []), [str(problem)]


def _leaks(encoded: Mapping[str, Sequence[Encoded]]) -> Mapping[str, Any]:
    return texts.leaks_in({part: [one.row for one in every] for part, every in encoded.items()})


def text(found: Survey) -> str:
    """Returns the check for people."""
    lines = []
    for part, f in found.parts.items():
        n = f["length"]
        lines.append(
            f"{part}: {f['rows']:,} rows, {f['tokens']:,} tokens, {f['learned']:,} of them learned;"
            f" {n['least']} to {n['most']} tokens a row, median {n['median']:g}"
        )
        widest = max(f["lengths"].values())
        lines += [
            f"  to {bound:>7,} {'#' * math.ceil(40 * n / widest):<40} {n:,}"
            for bound, n in f["lengths"].items()
        ]
    e = found.epoch
    lines.append(
        f"an epoch: {e['tokens']:,} tokens, {e['learned']:,} learned, in {e['windows']:,} windows"
        f" ({e['filled']:.0%} filled), {e['steps']:,} steps"
    )
    verdict = [f"WRONG {w}" for w in found.wrong] or ["nothing is wrong"]
    return "\n".join([*lines, *found.notes, *verdict])
