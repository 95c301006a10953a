"""report.html: a run told on one page, from the results.json, metrics.jsonl and config.json in its folder and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.analyse.page import figures, layer_plots, plots, run_page
from veneer.analyse.page.run_page import Told
from veneer.errors import FormatError
from veneer.files import read_json, replacing
from veneer.train.folder.drift import record
from veneer.train.folder.layout import METRICS, RESULTS
from veneer.train.folder.result import NEEDED

REPORT = "report.html"
WITHOUT = "the report has no pictures, which need the package matplotlib: pip install 'veneer[plots]', then veneer report {folder}"
Pictures = dict[str, Callable[[], Any]]


def write(folder: Path) -> list[str]:
    """Writes report.html and its PNGs into a finished run's folder; what is missing from it, as sentences. Raises FormatError."""
    run = Told(read_json(folder / RESULTS, NEEDED), record(folder), _lines(folder / METRICS), folder)
    drawn, missing = draw(folder, _pictures(run))
    put(folder, run_page.page_of(run, drawn, missing))
    return missing


def put(folder: Path, text: str) -> Path:
    """The page, whole or not there."""
    with replacing(folder / REPORT) as (temporary,):
        temporary.write_text(
            text, encoding="utf-8", errors="backslashreplace"
        )  # halves of letters, which JSON may hold
    return folder / REPORT


def draw(folder: Path, wanted: Pictures) -> tuple[dict[str, str], list[str]]:
    """The pictures as elements of a page, each also a PNG in the folder; and what cannot be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}, [WITHOUT.format(folder=folder)]
    with figures.style():
        return {name: figures.keep(make(), folder / f"{name}.png") for name, make in wanted.items()}, []


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as e:
        raise FormatError(
            f"{file} cannot be read as one JSON object a line: {e}; restore it from a copy"
        ) from None


def _pictures(run: Told) -> Pictures:
    results, lines = run.results, run.lines
    found: Pictures = {}
    if any(line.get("loss") is not None for line in lines):
        found["loss"] = lambda: plots.training_loss(lines)
    if any("valid_bpb" in line for line in lines):
        found["evaluations"] = lambda: plots.evaluations(lines, results)
    if any("valid_bpb" in line and "known_bpb" in line for line in lines):
        found["learning-vs-forgetting"] = lambda: plots.training_path(lines)
    if results.get("dial"):
        found["dial"] = lambda: plots.dial(results["dial"]["points"], results["dial"]["recommended"])
    changed = [layer for layer in results.get("layers") or () if layer["norm"] > 0]
    if changed:
        found["singular-values"] = lambda: layer_plots.singular_values(changed)
        found["effective-ranks"] = lambda: layer_plots.effective_ranks(changed)
    return found
