"""Runs the parts of the study, measures their trials, judges the claims and writes the page."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from veneer.analyse.page import compare_page
from veneer.errors import ConfigError, option, suggest
from veneer.files import read_json, replacing
from veneer.models import machine
from veneer.models.short_names import SMOLLM2
from veneer.search.compare.compare import compare, prepared
from veneer.search.compare.judge import Judge
from veneer.search.compare.settings import Comparison
from veneer.search.compare.training import TRIALS
from veneer.search.decide.trial import Trial
from veneer.search.study import protocol, sources
from veneer.search.study.claims import judged
from veneer.search.study.later import STEPS, steps_to_lora
from veneer.search.study.measures import PROFILE, measured
from veneer.search.study.report import page
from veneer.search.study.sources import Asked
from veneer.tasks import Metric
from veneer.train.folder import layout
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

Parts = dict[str, tuple[Run, Comparison]]


class Book(NamedTuple):
    """The parts of one page. stem: of the page's name; results: the file of verdicts in the study's folder.

    main: parts without which the page is incomplete.
    """

    stem: str
    results: str
    parts: Parts
    main: tuple[str, ...]


def study(
    out: str | None = None,
    *,
    quick: bool = False,
    part: str | None = None,
    to: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs the study of learning and forgetting as docs/study/protocol.md fixes it, and judges each claim.

    out: folder of the study; the same command goes on with it [runs/study, or runs/study-quick]
    quick: fewer steps and contenders, for two cores and half an hour
    part: one part alone: prose, c, ast, or smollm2 with its real weights (make real KEYS=smollm2, or the Hub)
    to: folder for the page and its pictures, such as docs/study
    """
    voice, out = Voice(progress), out or ("runs/study-quick" if quick else "runs/study")
    book = _book(out, quick, part)
    for name in book.main if part is None else [part]:
        voice.say(f"== {name}")
        run, comparison = book.parts[name]
        found = compare(run, comparison, progress=progress)
        compare_page.write(Path(comparison.out))
        questions = sources.rows()["test"] if name == protocol.AST else ()
        _measure(Path(comparison.out), found, book.parts[name], voice, questions)
    return {**_judge(Path(out), book, quick, to), "folder": out, "page": f"{out}/{book.stem}.md"}


def _book(out: str, quick: bool, part: str | None) -> Book:
    """Returns the page that a part belongs to. Raises ConfigError for an unknown part."""
    size = protocol.QUICKLY if quick else protocol.FULLY
    every = protocol.parts(size, out)
    main, known = tuple(every), [*every, protocol.AST, SMOLLM2]
    if part is not None and part not in known:
        raise ConfigError(f"part must be one of {', '.join(known)}, got {part!r}{suggest(part, known)}")
    if part == SMOLLM2 and quick:
        raise ConfigError(f"part {SMOLLM2} has one form; leave {option('quick')} out")
    if part == SMOLLM2:
        return Book(SMOLLM2, f"{SMOLLM2}.json", {SMOLLM2: protocol.confirming(out)}, (SMOLLM2,))
    if part == protocol.AST or (Path(out) / protocol.AST).is_dir():
        every[protocol.AST] = protocol.instructions(size, out)
    return Book("index", layout.RESULTS, every, main)


def _judge(out: Path, book: Book, quick: bool, to: str | None) -> dict[str, Any]:
    """Judges the claims by the parts that are measured; writes the verdicts and the page."""
    rows = {n: _rows(Path(c.out)) for n, (_, c) in book.parts.items() if (Path(c.out) / MEASURES).is_file()}
    metric = _metric(book.parts, rows)
    verdicts = judged(rows, metric) if metric else []
    made = {
        "quick": quick,
        "parts": sorted(rows),
        "missing": sorted(set(book.main) - set(rows)),
        "claims": [v._asdict() for v in verdicts],
        "versions": machine.versions(),
        "hardware": machine.hardware(machine.device("cpu")),
    }
    layout.put(out / book.results, made)
    if metric:
        _write(out, f"{book.stem}.md", page(made, rows, metric), rows, to)
    return made


MEASURES = "measures.json"


def _measure(
    folder: Path,
    found: Mapping[str, Any],
    part: tuple[Run, Comparison],
    voice: Voice,
    questions: Sequence[Asked],
) -> None:
    """Measures the first seed's trial of every contender."""
    known = read_json(folder / MEASURES) if (folder / MEASURES).is_file() else {}
    if known and all(PROFILE in one for one in known.values()):
        return
    runs, _, _ = prepared(*part, Voice(False))
    judge = Judge(runs[protocol.LORA], voice)
    made = {}
    for row in found["methods"]:
        if row["lr"] is not None and row["values"]:
            trial = folder / TRIALS / Trial(row["label"], row["lr"], found["seed"]).key
            with voice.phase(f"measuring the change of {row['label']}"):
                made[row["label"]] = measured(judge, trial, questions)
    layout.put(folder / MEASURES, made)


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    measures = read_json(folder / MEASURES)
    found = read_json(folder / layout.RESULTS, ("methods",))
    steps = steps_to_lora(folder, found)
    return {
        row["label"]: {**row, "measures": measures.get(row["label"], {}), STEPS: steps.get(row["label"])}
        for row in found["methods"]
    }


def _metric(every: Mapping[str, Any], rows: Mapping[str, Any]) -> Metric | None:
    folders = [Path(every[name][1].out) for name in rows]
    return Metric(**read_json(folders[0] / layout.RESULTS)["metric"]) if folders else None


def _write(out: Path, name: str, text: str, rows: Mapping[str, Any], to: str | None) -> None:
    """Writes the page beside copies of its pictures."""
    for folder in [out, *([Path(to)] if to else [])]:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / name) as (temporary,):
            temporary.write_text(text, encoding="utf-8")
        for part in rows:
            for picture in ("front", "scores"):
                if (out / part / f"{picture}.png").is_file():
                    shutil.copyfile(out / part / f"{picture}.png", folder / f"{part}-{picture}.png")
