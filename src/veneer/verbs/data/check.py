"""`veneer data check`: what a training would read, and what is wrong with it, without the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from veneer.data import leaks
from veneer.data.pack import Segment, n_labels, n_tokens, pack, segments
from veneer.data.row_files import Row
from veneer.data.tokens import Tokens
from veneer.errors import first_few
from veneer.models import pretrained
from veneer.runs.texts import texts
from veneer.train.loop.progress import Voice
from veneer.train.run import Run


@dataclass(frozen=True)
class Check:
    """parts: figures by part of the run; epoch: what one pass over the training text is; wrong: why not to train; notes: the rest."""

    parts: dict[str, dict[str, Any]]
    epoch: dict[str, Any]
    wrong: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Read(list[tuple[Row, list[Tokens]]]):
    """The rows of a part, each with the tokens of its examples."""

    @property
    def examples(self) -> list[Tokens]:
        return [t for _, own in self for t in own]


def check(run: Run) -> Check:
    """The texts that a run names, counted and compared. Raises the errors of texts that cannot be read."""
    run, voice = texts.named(run), Voice(False)
    rows = texts.gather(run, voice)
    tokenizer = pretrained.tokenizer(run.model)
    read = {
        part: Read((row, texts.encode_row(row, run, tokenizer)) for row in some)
        for part, some in rows.items()
    }
    figures = {part: _figures(found, run, tokenizer) for part, found in read.items()}
    wrong = [problem for part, found in figures.items() for problem in _problems(part, found, run)]
    found_leaks = _leaks(read, tokenizer)
    for part, found in found_leaks.items():
        figures[part]["leaks"] = {"equal": len(found.equal), "alike": len(found.alike)}
        wrong += [
            f"{part}: {len(w)} rows {what}: {first_few(w)}" for w, what in zip(found, LEAKS, strict=True) if w
        ]
    notes = [
        *voice.said,
        *(
            f"{p}: {f['duplicates']} rows are there more than once"
            for p, f in figures.items()
            if f["duplicates"]
        ),
    ]
    for f in figures.values():
        for name in ("too_long", "unlabelled", "endless"):
            f[name] = len(f[name])
    return Check(figures, _epoch(read["train"], run), wrong, notes)


LEAKS = (
    "are learned from too",
    f"share at least half of what is learned of them, in runs of {leaks.N} words, with the training text",
)


def _figures(read: Read, run: Run, tokenizer: Any) -> dict[str, Any]:
    lengths = sorted(len(t.ids) for t in read.examples)
    contents = [_content(own) for _, own in read]
    return {
        "rows": len(read),
        "examples": len(lengths),
        "tokens": sum(lengths),
        "learned": sum(int(t.learned[1:].sum()) for t in read.examples),
        "length": {"least": lengths[0], "median": median(lengths), "most": lengths[-1]},
        "lengths": histogram(lengths),
        "duplicates": len(contents) - len(set(contents)),
        "too_long": [
            row.where
            for row, own in read
            if row.kind != "text" and max(len(t.ids) for t in own) - 1 > run.length
        ],
        "unlabelled": [row.where for row, own in read if not _segments(row, own, run)],
        "endless": [row.where for row, own in read if texts.is_endless(row, own, tokenizer, run)],
    }


def _segments(row: Row, own: Sequence[Tokens], run: Run) -> list[Segment]:
    cut = own if row.kind == "text" else [t.first(run.length + 1) for t in own]
    return [s for t in cut for s in segments(t, run.length)]


def histogram(lengths: Sequence[int]) -> dict[int, int]:
    """How many lengths are at most 8, 16, 32, .. and more than half of that, from the first that has any to the last."""
    bounds = [max(8, 1 << (n - 1).bit_length()) for n in lengths]
    first, last = min(bounds).bit_length(), max(bounds).bit_length()
    return {1 << (b - 1): bounds.count(1 << (b - 1)) for b in range(first, last + 1)}


def _content(own: Sequence[Tokens]) -> bytes:
    return b"".join(t.ids.numpy().tobytes() + t.learned.numpy().tobytes() for t in own)


def _problems(part: str, found: Mapping[str, Any], run: Run) -> list[str]:
    told = []
    if found["too_long"] and not run.truncates:
        told.append(
            f"{part}: {len(found['too_long'])} rows are longer than length={run.length} tokens: {first_few(found['too_long'])}"
        )
    if found["unlabelled"]:
        told.append(
            f"{part}: {len(found['unlabelled'])} rows have no token to learn: {first_few(found['unlabelled'])}"
        )
    if found["endless"]:
        told.append(
            f"{part}: in {len(found['endless'])} conversations no end of a turn is learned: {first_few(found['endless'])};"
            f" the markers of the tokenizer's chat template should include it"
        )
    return told


def _leaks(read: Mapping[str, Read], tokenizer: Any) -> dict[str, leaks.Leaks]:
    def learned(own: Sequence[Tokens]) -> str:
        ids = [i for t in own for i in t.ids[t.learned].tolist()]
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    train = [(_content(own), learned(own)) for _, own in read["train"]]
    measured = (part for part in ("valid", "test") if part in read)
    return {
        part: leaks.find(train, [(row.where, _content(own), learned(own)) for row, own in read[part]])
        for part in measured
    }


def _epoch(read: Read, run: Run) -> dict[str, Any]:
    every = [s for row, own in read for s in _segments(row, own, run) * row.times]
    windows = pack(every, run.length) if run.packing else [(s,) for s in every]
    n = n_tokens(windows)
    return {
        "tokens": n,
        "learned": n_labels(windows),
        "windows": len(windows),
        "filled": n / (len(windows) * run.length) if windows else 0.0,
        "steps": math.ceil(len(windows) / (run.batch * run.accumulate)),
    }


def text(found: Check) -> str:
    """The check for people."""
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
        f"an epoch: {e['tokens']:,} tokens, {e['learned']:,} learned, in {e['windows']:,} windows ({e['filled']:.0%} filled),"
        f" {e['steps']:,} steps"
    )
    return "\n".join(
        [
            *lines,
            *found.notes,
            *(f"WRONG {w}" for w in found.wrong),
            *([] if found.wrong else ["nothing is wrong"]),
        ]
    )
