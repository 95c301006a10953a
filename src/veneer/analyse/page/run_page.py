"""The page of a run: its lead, its figures and its sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from veneer.analyse.numbers import moved, percent
from veneer.analyse.page import elements, plots, run_answers, run_facts, run_measures, run_record
from veneer.analyse.page.run_measures import Drawn
from veneer.analyse.page.run_record import RunRecord
from veneer.units import count, duration, size


def page_of(run: RunRecord, drawn: Drawn, missing: Sequence[str]) -> str:
    """Returns the page as HTML. drawn: pictures by name; missing: sentences on missing pictures."""
    settings = run.config["run"]
    method = (
        "loraplus"
        if (settings["method"], settings["optimiser"]) == ("lora", "loraplus")
        else settings["method"]
    )
    title = f"{plots.TITLES.get(method, method)} on {run_record.named(settings['model'])}"
    data = ", ".join(map(run_record.named, settings["data"]))
    above = f"Veneer {run.config.get('veneer', '')} · {data} · {run.folder}"
    parts = [
        elements.title(title, above),
        elements.paragraph(lead(run), "lead"),
        *(elements.paragraph(sentence, "missing") for sentence in missing),
        elements.tiles(_tiles(run)),
        run_measures.curves(run, drawn),
        run_measures.dial(run, drawn),
        run_answers.asked(run),
        run_answers.answers(run),
        run_measures.samples(run),
        run_measures.layers(run, drawn),
        run_facts.data(run),
        run_facts.cost(run),
        elements.section(
            "Configuration",
            elements.details(
                "all settings, defaults resolved",
                elements.card(elements.facts(run_facts.settings_of(settings))),
            ),
        ),
        elements.section("Log of the run", elements.card(elements.listed(run_facts.notes(run)))),
        elements.section("Versions", elements.card(elements.facts(run.results.get("versions", {})))),
    ]
    return elements.whole(f"{title}: {data}", parts)


def lead(run: RunRecord) -> str:
    """Returns the result of the run in two sentences."""
    r = run.results
    text, after, before = r["learned"]["text"], r["learned"]["after"], r["learned"]["before"]
    words = run.metric.words
    learned = f"On {text} text: {after:.3f} {words}, the base {before:.3f} ({percent(r['learned'])})."
    if not r["forgotten"]:
        return f"{learned} Forgetting was not measured, because no known text was given."
    change = r["forgotten"]["after"] - r["forgotten"]["before"]
    worse = run.metric.cost(change) > 0
    word = "worse: the amount it forgot" if worse else "better: no measurable forgetting"
    return f"{learned} On known text it is {abs(change):.3f} {words} {word} ({percent(r['forgotten'])})."


def _tiles(run: RunRecord) -> list[tuple[str, str, str, str]]:
    r, best = run.results, run.results["best_step"]
    rows = [
        (
            f"learned ({r['learned']['text']} text)",
            percent(r["learned"]),
            f"{moved(r['learned'])} {run.metric.words}",
            _colour(run, r["learned"]),
        )
    ]
    if r["forgotten"]:
        rows.append(
            (
                "forgotten (known text)",
                percent(r["forgotten"]),
                f"{moved(r['forgotten'])} {run.metric.words}",
                _colour(run, r["forgotten"]),
            )
        )
    if asked := r.get("answers"):
        right, before = f"{asked['after']} of {asked['asked']}", f"{asked['before']} before"
        better = "learned" if asked["after"] > asked["before"] else ""
        rows.append((f"right answers ({asked['text']} text)", right, before, better))
    total, n = r.get("base_parameters"), r["trainable_parameters"]
    rows.append(
        ("trained parameters", count(n), f"{n / total:.2%} of {count(total)}" if total else f"{n:,}", "")
    )
    rows.append(("adapter on disk", size(r["adapter_bytes"]), "safetensors", ""))
    kept = f", step {best} kept" if best not in (None, r["steps"]) else ""
    rows.append(("training", duration(r["seconds"]), f"{r['steps']} steps{kept}", ""))
    if (speed := run.tokens_per_second()) is not None:
        rows.append(("speed", f"{speed:,.0f}", "tokens per second, median", ""))
    if r["peak_memory_bytes"]:
        rows.append(("peak memory", size(r["peak_memory_bytes"]), run.memory_owner(), ""))
    return rows


def _colour(run: RunRecord, change: Mapping[str, float]) -> str:
    """Returns the CSS class of a figure: blue if it became better, orange if worse, plain if equal."""
    cost = run.metric.cost(change["after"]) - run.metric.cost(change["before"])
    return "learned" if cost < 0 else "forgotten" if cost > 0 else ""
