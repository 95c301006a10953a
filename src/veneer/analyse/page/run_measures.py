"""Sections of a run's page on measurements: curves, strength dial, samples and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.analyse.numbers import started
from veneer.analyse.page import elements
from veneer.analyse.page.run_record import NO_TEST, RunRecord
from veneer.tasks.base.abilities import Writer

Drawn = Mapping[str, str]


def curves(run: RunRecord, drawn: Drawn) -> str:
    skipped = run.results.get("skipped_steps")
    loss = "Loss on the batch of each step, before the update."
    loss += f" {skipped} steps were skipped." if skipped else ""
    n, example = run.config["run"]["eval_windows"], run.task.EXAMPLE
    part = f"on {n} evenly spaced {example}s of each text" if n else "on the full texts"
    test = (
        "Test text is measured before and after the run only." if "test" in run.results["after"] else NO_TEST
    )
    measured = f"Measured {part}. The kept step is chosen on valid text. {test}"
    path = (
        "One dot per evaluation; the star is the base. One run with one seed: small differences may be noise."
    )
    return elements.section(
        "Learning and forgetting",
        elements.row(
            _shown(drawn, "loss", "Training loss over steps", loss),
            _shown(drawn, "evaluations", f"{_headed(run)} on held-out and known text over steps", measured),
            _shown(drawn, "learning-vs-forgetting", "Valid text against known text during training", path),
        ),
    )


def _headed(run: RunRecord) -> str:
    words = run.metric.words
    return words[0].upper() + words[1:]


def _shown(drawn: Drawn, name: str, label: str, caption: str) -> str:
    return elements.picture(drawn[name], label, caption) if name in drawn else ""


def dial(run: RunRecord, drawn: Drawn) -> str:
    dial = run.results.get("dial")
    title = "Strength of the adapter"
    if not dial:
        return elements.section(
            title,
            elements.paragraph(
                f"Not measured in this run; to measure it: veneer report {run.folder} --measure", "sub"
            ),
        )
    at = {p["strength"]: p for p in dial["points"]}
    chosen, full = at[dial["recommended"]], at.get(1.0)
    best = f"{chosen['strength']:g}"
    says = [
        "An adapter can be used at any strength without retraining."
        f" Recommended strength, chosen on {dial['chosen_on']}: {best}."
    ]
    if full and chosen is not full:
        says.append(
            f"On {dial['text']} it reaches {_at(run, chosen)}; full strength reaches {_at(run, full)}."
        )
    elif full:
        says.append(f"On {dial['text']} it reaches {_at(run, chosen)}.")
    head, rows = _dial_rows(run, dial["points"])
    use = f"veneer generate PROMPT --adapter {run.folder}@{dial['recommended']:g}"
    return elements.section(
        title,
        elements.paragraph(" ".join(says)),
        elements.pair(
            _shown(drawn, "dial", f"{_headed(run)} at every strength", _of_dial(run, dial)),
            elements.card(
                elements.table(rows, head, numbers=0),
                elements.paragraph("To use it:", "small"),
                elements.command(use),
            ),
        ),
    )


def _of_dial(run: RunRecord, dial: Mapping[str, Any]) -> str:
    """Returns the caption of the dial: the examples that it was measured on."""
    other = "none of which chose the strength" if dial["apart"] else "which also chose the strength"
    examples = f"{dial['windows']} {run.task.EXAMPLE}{'s' if dial['windows'] > 1 else ''}"
    above = " that the figures above are of" if dial.get("as_measured") else ""
    return f"Measured on the {examples} of {dial['text']}{above}, {other}."


def _at(run: RunRecord, point: Mapping[str, Any]) -> str:
    target, *known = _values(run, point)
    return f"{target:.3f} {run.metric.words} on new" + (f" and {known[0]:.3f} on known text" if known else "")


def _values(run: RunRecord, point: Mapping[str, Any]) -> list[float]:
    """Returns the metric on new text and, if measured, on known text."""
    keys = (f"{text}_{run.metric.name}" for text in ("target", "known"))
    return [point[k] for k in keys if point.get(k) is not None]


def _dial_rows(run: RunRecord, points: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["strength", "new text", "known text"]
    rows = [[f"{p['strength']:g}", *(f"{v:.3f}" for v in _values(run, p))] for p in points]
    return head[: len(rows[0])], rows


def samples(run: RunRecord) -> str:
    found = run.results.get("samples")
    if not found and not issubclass(run.task, Writer):
        return ""
    if not found:
        return elements.section(
            "Before and after",
            elements.paragraph(
                f"Not measured in this run; to measure it: veneer report {run.folder} --measure", "sub"
            ),
        )
    cards = []
    for row in found["rows"]:
        truth = [("original text", row["truth"])] if row.get("truth") else []
        cards.append(
            elements.continued(row["prompt"], [("base", row["before"]), ("adapted", row["after"]), *truth])
        )
    how = f"Sampled at temperature {found['temperature']:g} from one seed, at most {found['tokens']} tokens"
    return elements.section(
        "Before and after",
        elements.paragraph(f"{found['source']}. {how}. Single samples, not a measurement.", "sub"),
        *cards,
    )


def layers(run: RunRecord, drawn: Drawn) -> str:
    layers = run.results.get("layers")
    if not layers:
        return ""
    values = "A steep line: the change of the layer uses few of the directions that its rank allows."
    ranks = (
        "Effective rank: exp of the entropy of the singular values."
        " Colour: norm of the change relative to the norm of the weight."
    )
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
        "Changes by layer",
        elements.paragraph(f"Before the first step {started(start)}.", "sub") if start else "",
        elements.pair(
            _shown(drawn, "singular-values", "Singular values of the change", values),
            _shown(drawn, "effective-ranks", "Effective rank of the change by layer", ranks),
        ),
        elements.details(
            f"table of all {len(layers)} matrices", elements.card(elements.table(rows, head, numbers=1))
        ),
    )
