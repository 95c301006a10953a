"""`veneer data check`: counts and compares the texts of a run, without the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from veneer.data.pack import n_labels, n_tokens, pack
from veneer.data.tokens import Tokens
from veneer.errors import DataError, first_few
from veneer.runs.texts import decided, texts
from veneer.runs.texts.encoded import Encoded, LeftOut, is_endless, keep, segments_of
from veneer.train.loop.progress import Voice
from veneer.train.run import Run


@dataclass(frozen=True)
class Check:
    """parts: figures by part of the run; epoch: size of one pass; wrong: reasons not to train; notes: the"
    " rest."""

    parts: dict[str, dict[str, Any]]
    epoch: dict[str, Any]
    wrong: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def check(run: Run) -> Check:
    """Counts and compares the texts that a run names. Raises the errors of unreadable texts."""
    run, voice = texts.named(run), Voice(False)
    rows = texts.gather(run, voice)
    tokenizer = decided.tokenizer_of(run, voice)
    decided.say_template(rows, tokenizer, voice)
    encoded = texts.encode_all(rows, run, tokenizer)
    run = decided.with_length(run, encoded["train"], voice)
    figures, wrong, kept = {}, [], {}
    for part, every in encoded.items():
        try:
            kept[part], left_out = keep(every, run, part, voice)
        except DataError as problem:
            kept[part], left_out = [one for one in every if segments_of(one, run.window)], LeftOut([], [], [])
            wrong.append(str(problem))
        endless = [one.row.where for one in every if is_endless(one, tokenizer, run)]
        figures[part] = {**_figures(every, run), "endless": len(endless), "left_out": left_out._asdict()}
        if endless:
            wrong.append(
                f"{part}: in {len(endless)} conversations no end of a turn is learned: {first_few(endless)};"
                f" the markers of the chat template should include it"
            )
    for part, leak in texts.leaks_in(rows).items() if run.chooses else ():
        figures[part]["leaks"] = {"equal": len(leak.equal), "alike": len(leak.alike)}
        wrong += leak.sentences(part, [first_few(names) for names in leak])
    notes = [note for note in voice.said if not note.endswith(texts.FLATTERS)]
    notes += [
        f"{p}: {f['duplicates']} rows occur more than once" for p, f in figures.items() if f["duplicates"]
    ]
    return Check(figures, _epoch(kept["train"], run), wrong, notes)


def _figures(every: Sequence[Encoded], run: Run) -> dict[str, Any]:
    found = [t for one in every for t in one.examples]
    lengths = sorted(len(t.ids) for t in found) or [0]
    contents = [_content(one.examples) for one in every if one.examples]
    return {
        "rows": len(every),
        "examples": len(found),
        "tokens": sum(lengths),
        "learned": sum(int(t.learned[1:].sum()) for t in found),
        "length": {"least": lengths[0], "median": median(lengths), "most": lengths[-1]},
        "lengths": histogram(lengths),
        "duplicates": len(contents) - len(set(contents)),
        "too_long": sum(one.whole is not None and one.whole > run.window for one in every),
        "unlabelled": sum(not segments_of(one, run.window) for one in every),
    }


def histogram(lengths: Sequence[int]) -> dict[int, int]:
    """Counts lengths up to 8, 16, 32, .. and above half of that, from the first such bound to the last."""
    bounds = [max(8, 1 << (n - 1).bit_length()) for n in lengths]
    first, last = min(bounds).bit_length(), max(bounds).bit_length()
    return {1 << (b - 1): bounds.count(1 << (b - 1)) for b in range(first, last + 1)}


def _content(own: Sequence[Tokens]) -> bytes:
    return b"".join(t.ids.numpy().tobytes() + t.learned.numpy().tobytes() for t in own)


def _epoch(kept: Sequence[Encoded], run: Run) -> dict[str, Any]:
    every = [s for one in kept for s in segments_of(one, run.window) * one.row.times]
    windows = pack(every, run.window) if run.packing else [(s,) for s in every]
    n = n_tokens(windows)
    return {
        "length": run.window,
        "tokens": n,
        "learned": n_labels(windows),
        "windows": len(windows),
        "filled": n / (len(windows) * run.window) if windows else 0.0,
        "steps": math.ceil(len(windows) / (run.batch * run.accumulate)),
    }


def text(found: Check) -> str:
    """Returns the check as text for people."""
    lines = []
    for part, f in found.parts.items():
        span = (
            f"{f['length']['least']} to {f['length']['most']} tokens a row, median {f['length']['median']:g}"
        )
        lines.append(
            f"{part}: {f['rows']:,} rows, {f['tokens']:,} tokens, {f['learned']:,} of them learned; {span}"
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
    return "\n".join(
        [
            *lines,
            *found.notes,
            *(f"WRONG {w}" for w in found.wrong),
            *([] if found.wrong else ["nothing is wrong"]),
        ]
    )
