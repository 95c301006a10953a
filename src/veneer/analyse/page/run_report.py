"""Writes report.html, one page about a run, from results.json, metrics.jsonl and config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer import foreign
from veneer.analyse.page import figures, layer_plots, plots, run_page
from veneer.analyse.page.run_record import RunRecord
from veneer.errors import FormatError
from veneer.files import read_json, replacing
from veneer.train.folder.drift import record
from veneer.train.folder.layout import METRICS, RESULTS
from veneer.train.folder.result import NEEDED

REPORT = "report.html"
WITHOUT = (
    "the report lacks pictures, because matplotlib is not installed: pip install 'veneer[plots]', then veneer"
    " report {folder}"
)
Pictures = dict[str, Callable[[], Any]]


def write(folder: Path) -> list[str]:
    """Writes report.html and its PNGs into the folder of a finished run.

    Returns sentences about missing parts. Raises FormatError for damaged files.
    """
    run = RunRecord(read_json(folder / RESULTS, NEEDED), record(folder), _lines(folder / METRICS), folder)
    drawn, missing = draw(folder, _pictures(run))
    put(folder, run_page.page_of(run, drawn, missing))
    return missing


def put(folder: Path, text: str) -> Path:
    """Writes the page, completely or not at all; returns its path."""
    with replacing(folder / REPORT) as (temporary,):
        # JSON may hold unpaired surrogates, which UTF-8 cannot encode
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder / REPORT


def draw(folder: Path, wanted: Pictures) -> tuple[dict[str, str], list[str]]:
    """Draws each picture as a PNG in the folder.

    Returns {name: <svg> element} and sentences about pictures that cannot be drawn.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}, [WITHOUT.format(folder=folder)]
    with figures.style():
        return {name: figures.keep(make(), folder / f"{name}.png") for name, make in wanted.items()}, []


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [foreign.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as e:
        raise FormatError(f"{file} must hold one JSON object per line: {e}; restore it from a copy") from None


def _pictures(run: RunRecord) -> Pictures:
    results, lines, metric = run.results, run.lines, run.metric
    valid, known = f"valid_{metric.name}", f"known_{metric.name}"
    found: Pictures = {}
    if any(line.get("loss") is not None for line in lines):
        found["loss"] = lambda: plots.training_loss(lines)
    if any(valid in line for line in lines):
        found["evaluations"] = lambda: plots.evaluations(lines, results, metric)
    if any(valid in line and known in line for line in lines):
        found["learning-vs-forgetting"] = lambda: plots.training_path(lines, metric)
    if dial := results.get("dial"):
        found["dial"] = lambda: plots.dial(dial["points"], dial["recommended"], metric)
    changed = [layer for layer in results.get("layers") or () if layer["norm"] > 0]
    if changed:
        found["singular-values"] = lambda: layer_plots.singular_values(changed)
        found["effective-ranks"] = lambda: layer_plots.effective_ranks(changed)
    return found
