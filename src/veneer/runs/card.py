"""Writes README.md beside an adapter: a model card, from the files of its run and nothing else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer import methods
from veneer.adapt.peft import settings
from veneer.adapt.store import manifest
from veneer.analyse.numbers import percent, plain
from veneer.analyse.page import run_page, run_record
from veneer.analyse.page.run_record import RunRecord
from veneer.files import read_json, replacing
from veneer.foreign import visible
from veneer.methods.base import described
from veneer.runs import usage
from veneer.tasks import Metric
from veneer.train.folder.drift import record as record_of
from veneer.train.folder.layout import ADAPTER, LEFT_OUT, RESULTS
from veneer.units import duration, size

CARD = "README.md"
# Settings that shape a training, in the card's order; data, method and places have sections of their own.
SHAPING = (
    "steps epochs batch accumulate length packing lr embedding_lr schedule warmup optimiser optimiser_options"
    " weight_decay betas clip label_smoothing precision seed"
).split()


def write(run: Path) -> Path:
    """Writes the card into the adapter's folder of a finished run. Raises FormatError for damaged files."""
    folder = run / ADAPTER
    content = text(
        RunRecord(read_json(run / RESULTS), record_of(run), (), run),
        read_json(folder / manifest.NAME),
        _peft(folder),
    )
    with replacing(folder / CARD) as (temporary,):
        temporary.write_text(content, encoding="utf-8")
    return folder / CARD


def _peft(folder: Path) -> dict[str, Any] | None:
    path = folder / settings.CONFIG
    return read_json(path) if path.exists() else None


def text(run: RunRecord, record: Mapping[str, Any], peft: Mapping[str, Any] | None) -> str:
    """Returns the card. record: veneer.json; peft: adapter_config.json, None if PEFT cannot express the
    adapter."""
    settings = run.config["run"]
    about = described.of_module(methods.get(record["method"]))
    parts = [
        _header(settings, run.task.PIPELINE, record, peft),
        f"# {about.summary.partition(':')[0]} on {_escaped(Path(settings['model']).name)}",
        _escaped(run_page.lead(run)),
        *_section("Base", _base(run)),
        *_section("Method", _method(about, record, run)),
        *_section("Data", _data(run)),
        *_section("Learned and forgotten", _figures(run)),
        *_section("Training", _table(("setting", "value"), _settings(settings))),
        *_section("Cost", _cost(run)),
        *_section("Load it", *_ways(run, record, peft)),
    ]
    return "\n\n".join(parts) + "\n"


def _ways(run: RunRecord, record: Mapping[str, Any], peft: Mapping[str, Any] | None) -> list[str]:
    """Returns the ways to load the adapter; a base in a folder goes by the folder's name."""
    model, task = run.config["run"]["model"], run.task
    name = run_record.named(model)
    head = task.head_options(run.config["run"].get("task_options") or {})
    said = [] if name == model else [f"`{name}` stands for the path of the base model's folder."]
    return [*said, *usage.ways(name, task.AUTO, record, peft, head)]


def _section(title: str, *parts: str) -> list[str]:
    return [f"## {title}", *parts]


def _header(
    settings: Mapping[str, Any], pipeline: str, record: Mapping[str, Any], peft: Mapping[str, Any] | None
) -> str:
    """Returns the Hub's YAML, without a licence, and without a base that is a folder of this machine."""
    tags = dict.fromkeys([record["method"], *([peft["peft_type"].lower()] if peft else []), "veneer"])
    model = settings["model"]
    lines = [] if Path(model).exists() or "/" not in model else [f"base_model: {json.dumps(model)}"]
    lines += [
        f"library_name: {'peft' if peft else 'veneer'}",
        f"pipeline_tag: {pipeline}",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---"])


def _base(run: RunRecord) -> str:
    base = run.config["base"]
    return (
        f"{_code(run_record.named(base['model']))}, a {base['class']};"
        f" fingerprint of its weights `{base['sha256']}`."
        " Veneer refuses to load this on another base."
    )


def _method(about: described.Described, record: Mapping[str, Any], run: RunRecord) -> str:
    kind = methods.get(record["method"])
    helps, options = described.option_helps(kind), record["options"]
    paper = f" ([paper]({about.paper}))" if about.paper else ""
    sites = record["sites"].values()
    ranks = sorted({s["rank"] for s in sites if "rank" in s})
    scales = sorted({s["scaling"] for s in sites if "scaling" in s})
    shown = f", of rank {_span(ranks)}" if ranks else ""
    shown += f", scaled by {_span(scales)}" if scales else ""
    trained = (
        f"{len(sites)} layers are changed{shown}: {run.results['trainable_parameters']:,} trained parameters."
    )
    rows = [(f"`{name}`", _escaped(plain(value)), helps.get(name, "")) for name, value in options.items()]
    options = [_table(("option", "value", "meaning"), rows)] if rows else []
    return "\n\n".join([f"{about.summary}{paper}.", trained, *options])


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _data(run: RunRecord) -> str:
    settings, facts, shown = run.config["run"], run.config["data"], run.task.FACTS
    rows = [
        (
            part,
            ", ".join(
                _escaped(run_record.named(s)) for s in settings.get(part if part != "train" else "data", ())
            )
            or "split off from train",
        )
        + tuple(f"{facts[part][k]:,}" for k in shown)
        for part in run_record.PARTS
        if part in facts
    ]
    if settings.get("stream"):
        rows[0] = (f"{rows[0][0]} (the beginning of a stream)", *rows[0][1:])
    table = _table(("text", "from", *(k.replace("_", " ") for k in shown)), rows)
    about = (run.task.described(settings), run.config.get("rendering", ""))
    said = [*map(_escaped, about), *_left_out(facts, settings)]
    return "\n\n".join(filter(None, [table, *said]))


def _left_out(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Returns a sentence on rows that were not used, or nothing."""
    words = {"overlong": f"longer than {settings['length']} tokens", "empty": "without anything to learn"}
    found = [
        f"{facts[part][why]:,} {part} rows {words[why]}"
        for part in run_record.PARTS
        for why in words
        if facts.get(part, {}).get(why)
    ]
    return [f"Left out: {', '.join(found)}. {LEFT_OUT} in the run's folder names them."] if found else []


def _figures(run: RunRecord) -> str:
    before, after = run.results["before"], run.results["after"]
    rows = [
        ("known text" if name == "known" else f"new text ({name})", *_moved(before[name], after[name]))
        for name in run_record.PARTS
        if name in after
    ]
    words, better = run.metric.words, run.metric.better
    says = [
        f"{words[0].upper()}{words[1:]}; {better} is better. One run with one seed: small differences may be"
        " noise."
    ]
    if "test" not in after:
        says.append(run_record.NO_TEST)
    if dial := run.results.get("dial"):
        says.append(_dialled(dial, run.metric))
    return f"{_table(('text', 'before', 'after', 'change'), rows)}\n\n{' '.join(says)}"


def _dialled(dial: Mapping[str, Any], metric: Metric) -> str:
    at = next(p for p in dial["points"] if p["strength"] == dial["recommended"])
    on_known = at.get(f"known_{metric.name}")
    known = f", {on_known:.3f} on known text" if on_known is not None else ""
    chosen = f"Used at strength {dial['recommended']:g}, chosen on {dial['chosen_on']}"
    return f"{chosen}: {at[f'target_{metric.name}']:.3f} on {dial['text']}{known}."


def _moved(before: float, after: float) -> tuple[str, str, str]:
    return f"{before:.3f}", f"{after:.3f}", percent({"before": before, "after": after})


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"`{name}`", _escaped(plain(settings[name])))
        for name in SHAPING
        if settings.get(name) not in (None, {}, ())
    ]


def _cost(run: RunRecord) -> str:
    r = run.results
    memory = f", {size(r['peak_memory_bytes'])} of memory at most" if r["peak_memory_bytes"] else ""
    versions = ", ".join(
        f"{name} {v}" for name, v in {"veneer": run.config["veneer"], **r["versions"]}.items()
    )
    kept = "" if r["best_step"] in (None, r["steps"]) else f"; the weights are those of step {r['best_step']}"
    return (
        f"{r['steps']:,} steps and {r['tokens']:,} tokens in {duration(r['seconds'])} on"
        f" {r['hardware']}{memory}{kept}. The adapter takes {size(r['adapter_bytes'])}. {versions}."
    )


def _escaped(text: str) -> str:
    """Returns Markdown that shows a text from a file or a setting, as the page does: no tag, link or cell."""
    shown = html.escape(visible(text), quote=False).replace("\n", " ").replace("\t", " ")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", shown)


def _code(text: str) -> str:
    """Returns a text as code; a backtick inside it would end the code."""
    return f"`{visible(text).replace('`', chr(0x2CB)).replace(chr(10), ' ')}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; bars inside cells are escaped."""
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", cell).replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *cells])
