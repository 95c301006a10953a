"""Sections of a run's page on its data, cost, settings and log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.analyse.numbers import plain
from veneer.analyse.page import elements, run_record
from veneer.analyse.page.run_record import PARTS, RunRecord
from veneer.units import duration, size


def data(run: RunRecord) -> str:
    shown = run.task.FACTS
    head = ["text", *(name.replace("_", " ") for name in shown)]
    rows = [
        [f"{part} (its beginning)" if "stream" in f else part, *(f"{f[k]:,}" for k in shown)]
        for part, f in sorted(
            run.config["data"].items(),
            key=lambda item: PARTS.index(item[0]) if item[0] in PARTS else len(PARTS),
        )
    ]
    preview = [elements.card(elements.tokens(pieces)) for pieces in run.results.get("preview") or ()]
    says = "The first training texts by token: marked tokens are trained on, the others are context."
    return elements.section(
        "Data",
        elements.card(elements.table(rows, head, numbers=1)),
        elements.paragraph(says, "sub") if preview else "",
        *preview,
    )


def cost(run: RunRecord) -> str:
    r, settings = run.results, run.config["run"]
    entries = {
        "trained parameters": f"{r['trainable_parameters']:,}",
        "parameters of the base": f"{r['base_parameters']:,}" if "base_parameters" in r else "",
        "adapter on disk": f"{r['adapter_bytes']:,} bytes",
        "peak memory": f"{size(r['peak_memory_bytes'])} {run.memory_owner()}"
        if r["peak_memory_bytes"]
        else "",
        "tokens trained on": f"{r['tokens']:,}",
        "time": (
            f"{duration(r['seconds'])}, evaluations and checkpoints included;"
            f" {r['seconds'] / max(1, r['steps']):.3g} s per step"
        ),
        "speed": f"{speed:,.0f} tokens per second in the median step"
        if (speed := run.tokens_per_second()) is not None
        else "",
        "device and precision": f"{settings['device']}, {settings['precision']}",
        "report": f"{duration(r['report_seconds'])} of measurements" if "report_seconds" in r else "",
    }
    return elements.section(
        "Parameters, memory, speed", elements.card(elements.facts({k: v for k, v in entries.items() if v}))
    )


def settings_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns all settings as text; a model in a folder goes by the folder's name."""
    shown = {**settings, "model": run_record.named(settings["model"])}
    return {name: plain(value) for name, value in shown.items()}


def notes(run: RunRecord) -> list[str]:
    """Returns the messages of the run in order, each once; checks turned off on resuming come first."""
    allowed = [f"allowed: {a}" for a in run.config.get("allowed", ())]
    return list(dict.fromkeys([*allowed, *run.config.get("notes", ()), *run.results.get("notes", ())])) or [
        "no messages"
    ]
