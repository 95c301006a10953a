"""What the page of a run says, section by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from veneer.analyse.numbers import moved, percent, plain, started
from veneer.analyse.page import elements, plots
from veneer.units import count, duration, size


class Told(NamedTuple):
    """A finished run as its files have it: results.json, config.json, the lines of metrics.jsonl, and the folder."""

    results: Mapping[str, Any]
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    folder: Path


Drawn = Mapping[str, str]
NO_TEST = (
    "No test text was given, so what was learned is reported on the same text, which flatters it a little."
)
PARTS = ("train", "valid", "test", "known")


def page_of(run: Told, drawn: Drawn, missing: Sequence[str]) -> str:
    """The whole page. drawn: pictures by name; missing: what could not be drawn, as sentences."""
    settings = run.config["run"]
    method = (
        "loraplus"
        if (settings["method"], settings["optimiser"]) == ("lora", "loraplus")
        else settings["method"]
    )
    title = f"{plots.TITLES.get(method, method)} on {settings['model']}"
    above = f"Veneer {run.config.get('veneer', '')} · {', '.join(settings['data'])} · {run.folder}"
    parts = [
        elements.title(title, above),
        elements.paragraph(lead(run), "lead"),
        *(elements.paragraph(sentence, "missing") for sentence in missing),
        elements.tiles(_tiles(run)),
        _curves(run, drawn),
        _dial(run, drawn),
        _samples(run),
        _layers(run, drawn),
        _data(run),
        _cost(run),
        elements.section(
            "Configuration",
            elements.details(
                "every setting as it was resolved", elements.card(elements.facts(_settings(settings)))
            ),
        ),
        elements.section("What the run said", elements.card(elements.listed(_notes(run)))),
        elements.section("Versions", elements.card(elements.facts(run.results.get("versions", {})))),
    ]
    return elements.whole(f"{title}: {', '.join(settings['data'])}", parts)


def lead(run: Told) -> str:
    """The run in two sentences."""
    r = run.results
    text, after, before = r["learned"]["text"], r["learned"]["after"], r["learned"]["before"]
    learned = f"On {text} text it needs {after:.3f} bits per byte where the base needs {before:.3f} ({percent(r['learned'])})."
    if not r["forgotten"]:
        return f"{learned} No known text was given, so what was forgotten is not measured."
    change = r["forgotten"]["after"] - r["forgotten"]["before"]
    word = "more: that is what it forgot" if change > 0 else "less: nothing measurable was forgotten"
    return f"{learned} On known text it needs {abs(change):.3f} bits per byte {word} ({percent(r['forgotten'])})."


def _tiles(run: Told) -> list[tuple[str, str, str, str]]:
    r, best = run.results, run.results["best_step"]
    rows = [
        (
            f"learned ({r['learned']['text']} text)",
            percent(r["learned"]),
            f"{moved(r['learned'])} bits/byte",
            "learned",
        )
    ]
    if r["forgotten"]:
        rows.append(
            (
                "forgotten (known text)",
                percent(r["forgotten"]),
                f"{moved(r['forgotten'])} bits/byte",
                "forgotten",
            )
        )
    total, n = r.get("base_parameters"), r["trainable_parameters"]
    rows.append(
        ("trained parameters", count(n), f"{n / total:.2%} of {count(total)}" if total else f"{n:,}", "")
    )
    rows.append(("adapter on disk", size(r["adapter_bytes"]), "safetensors", ""))
    kept = f", step {best} kept" if best not in (None, r["steps"]) else ""
    rows.append(("training", duration(r["seconds"]), f"{r['steps']} steps{kept}", ""))
    if (speed := _speed(run)) is not None:
        rows.append(("speed", f"{speed:,.0f}", "tokens per second, median", ""))
    if r["peak_memory_bytes"]:
        rows.append(("peak memory", size(r["peak_memory_bytes"]), _memory_of(run), ""))
    return rows


def _speed(run: Told) -> float | None:
    """Tokens per second of the median step; the first ones warm up."""
    found = [line["tokens_per_second"] for line in run.lines if "tokens_per_second" in line]
    return median(found[len(found) // 10 :]) if found else None


def _memory_of(run: Told) -> str:
    return "of the GPU" if run.config["run"]["device"].startswith("cuda") else "of the process, all included"


def _curves(run: Told, drawn: Drawn) -> str:
    skipped = run.results.get("skipped_steps")
    loss = "Loss on the batch of each step, before the step is taken." + (
        f" {skipped} steps were skipped." if skipped else ""
    )
    windows = run.config["run"]["eval_windows"]
    part = f"on {windows} evenly spaced windows of each text" if windows else "on all of each text"
    apart = "Test text is measured before and after only." if "test" in run.results["after"] else NO_TEST
    measured = f"Measured {part}. The step that is kept is chosen on valid text. {apart}"
    path = "A dot for every evaluation, from the base (star) on. One run with one seed: small moves may be noise."
    return elements.section(
        "Learning and forgetting",
        elements.row(
            _shown(drawn, "loss", "Training loss over steps", loss),
            _shown(drawn, "evaluations", "Bits per byte on held-out and known text over steps", measured),
            _shown(drawn, "learning-vs-forgetting", "Valid text against known text during training", path),
        ),
    )


def _shown(drawn: Drawn, name: str, label: str, caption: str) -> str:
    return elements.picture(drawn[name], label, caption) if name in drawn else ""


def _dial(run: Told, drawn: Drawn) -> str:
    dial = run.results.get("dial")
    title = "The strength dial"
    if not dial:
        return elements.section(
            title,
            elements.paragraph(
                f"Not measured in this run: veneer report {run.folder} --measure does it.", "sub"
            ),
        )
    at = {p["strength"]: p for p in dial["points"]}
    chosen, full = at[dial["recommended"]], at.get(1.0)
    best = f"{chosen['strength']:g}"
    says = [
        f"An adapter can be used at any strength without training again. Chosen on {dial['chosen_on']}: strength {best}."
    ]
    if full and chosen is not full:
        says.append(f"On {dial['text']} it gives {_at(chosen)}; full strength gives {_at(full)}.")
    elif full:
        says.append(f"On {dial['text']} it gives {_at(chosen)}.")
    head, rows = _dial_rows(dial["points"])
    use = f"veneer generate PROMPT --adapter {run.folder}@{dial['recommended']:g}"
    apart = "not the ones it was chosen by" if dial["apart"] else "the same that it was chosen by"
    caption = f"Measured on {dial['windows']} window{'s' if dial['windows'] > 1 else ''} of {dial['text']}, {apart}."
    return elements.section(
        title,
        elements.paragraph(" ".join(says)),
        elements.pair(
            _shown(drawn, "dial", "Bits per byte at every strength", caption),
            elements.card(
                elements.table(rows, head, numbers=0),
                elements.paragraph("Use it so:", "small"),
                elements.command(use),
            ),
        ),
    )


def _at(point: Mapping[str, Any]) -> str:
    known = f" and {point['known_bpb']:.3f} on known text" if point.get("known_bpb") is not None else ""
    return f"{point['target_bpb']:.3f} bits per byte on new{known}"


def _dial_rows(points: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["strength", "new text", "known text"]
    rows = [
        [f"{p['strength']:g}", *(f"{p[k]:.3f}" for k in ("target_bpb", "known_bpb") if p.get(k) is not None)]
        for p in points
    ]
    return head[: len(rows[0])], rows


def _samples(run: Told) -> str:
    found = run.results.get("samples")
    if not found:
        return elements.section(
            "Before and after",
            elements.paragraph(f"Not measured: veneer report {run.folder} --measure does it.", "sub"),
        )
    cards = []
    for row in found["rows"]:
        truth = [("the text itself", row["truth"])] if row.get("truth") else []
        cards.append(
            elements.continued(row["prompt"], [("base", row["before"]), ("adapted", row["after"]), *truth])
        )
    how = f"Drawn at temperature {found['temperature']:g} with the same random numbers, {found['tokens']} tokens at most"
    return elements.section(
        "Before and after",
        elements.paragraph(f"{found['source']}. {how}; single samples, not a measure.", "sub"),
        *cards,
    )


def _layers(run: Told, drawn: Drawn) -> str:
    layers = run.results.get("layers")
    if not layers:
        return ""
    values = "How the change of a layer is spread over directions: a steep line uses few of those it may use."
    ranks = "Effective rank: exp of the entropy of the singular values. Colour: the norm of the change over the norm of the weight."
    head = ["layer", "rank", "effective", "for 90 %", "norm", "of W"]
    rows = [
        [
            s["site"],
            str(s["rank"]),
            f"{s['effective_rank']:.1f}",
            str(s["energy_rank"]),
            f"{s['norm']:.3g}",
            f"{s['relative']:.2%}",
        ]
        for s in layers
    ]
    start = run.results.get("start")
    return elements.section(
        "What changed inside",
        elements.paragraph(f"Before the first step {started(start)}.", "sub") if start else "",
        elements.pair(
            _shown(drawn, "singular-values", "Singular values of the change", values),
            _shown(drawn, "effective-ranks", "Effective rank of the change, layer by layer", ranks),
        ),
        elements.details(
            f"all {len(layers)} matrices as numbers", elements.card(elements.table(rows, head, numbers=1))
        ),
    )


def _data(run: Told) -> str:
    head = ["text", "rows", "windows", "tokens", "learned tokens", "learned"]
    rows = [
        [
            f"{part} (its beginning)" if "stream" in f else part,
            *(f"{f[k]:,}" for k in ("rows", "windows", "tokens", "learned_tokens")),
            f"{f['learned_tokens'] / f['tokens']:.1%}",
        ]
        for part, f in sorted(
            run.config["data"].items(),
            key=lambda item: PARTS.index(item[0]) if item[0] in PARTS else len(PARTS),
        )
    ]
    preview = [elements.card(elements.tokens(pieces)) for pieces in run.results.get("preview") or ()]
    says = "The beginning of what is trained on, token by token: marked tokens are learned, the others are only read."
    return elements.section(
        "Data",
        elements.card(elements.table(rows, head, numbers=1)),
        elements.paragraph(says, "sub") if preview else "",
        *preview,
    )


def _cost(run: Told) -> str:
    r, settings = run.results, run.config["run"]
    entries = {
        "trained parameters": f"{r['trainable_parameters']:,}",
        "parameters of the base": f"{r['base_parameters']:,}" if "base_parameters" in r else "",
        "adapter on disk": f"{r['adapter_bytes']:,} bytes",
        "peak memory": f"{size(r['peak_memory_bytes'])} {_memory_of(run)}" if r["peak_memory_bytes"] else "",
        "tokens trained on": f"{r['tokens']:,}",
        "time": f"{duration(r['seconds'])} with evaluations and checkpoints; {r['seconds'] / max(1, r['steps']):.3g} s a step",
        "speed": f"{speed:,.0f} tokens per second in the median step"
        if (speed := _speed(run)) is not None
        else "",
        "computed on": f"{settings['device']}, {settings['precision']}",
        "this report": f"{duration(r['report_seconds'])} of measuring" if "report_seconds" in r else "",
    }
    return elements.section(
        "Parameters, memory, speed", elements.card(elements.facts({k: v for k, v in entries.items() if v}))
    )


def _settings(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: plain(value) for name, value in settings.items()}


def _notes(run: Told) -> list[str]:
    """Everything that was said, once, in order; what was allowed when the run went on first."""
    allowed = [f"allowed: {a}" for a in run.config.get("allowed", ())]
    return list(dict.fromkeys([*allowed, *run.config.get("notes", ()), *run.results.get("notes", ())])) or [
        "nothing"
    ]
