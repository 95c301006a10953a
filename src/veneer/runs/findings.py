"""What a report shows beyond the training's own figures: the dial, the layers, samples, and what was learned of the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from veneer.adapt.attached import changes, n_base_parameters
from veneer.adapt.switch import using
from veneer.analyse.spectra import spectra
from veneer.data.pack import IGNORED, Segment, Window
from veneer.errors import VeneerError
from veneer.runs.dial import STRENGTHS, Point, dial, recommend
from veneer.runs.samples import continuation
from veneer.runs.texts.texts import Text
from veneer.tasks import Objective
from veneer.train.loop.evaluate import bits_per_byte, sample
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

WINDOWS = 6  # of each text and each half of known text: all strengths together cost about as much as eight training steps
VALUES = 64  # singular values of a matrix that are kept
SHOWN = 3  # rows of data, of those that begin in the first LOOKED windows
LOOKED = 100
SAMPLES = 2  # prompts
TOKENS = {"preview": 120, "prompt": 24, "longest prompt": 200, "written": 48}
TEMPERATURE = 0.7
DENSE = 3e10  # out * in * min(out, in) of all matrices whose singular values are computed from the whole change: some 10 s

Texts = Mapping[str, Text]
Between = Callable[[], None]


def examine(
    model: nn.Module,
    name: str,
    tokenizer: Any,
    texts: Texts,
    objective: Objective,
    *,
    run: Run,
    voice: Voice,
    prompts: Sequence[str] = (),
    between: Between = lambda: None,
) -> dict[str, Any]:
    """base_parameters, dial, layers, samples, preview and report_seconds for results.json, of adapter `name`.

    prompts: what to continue, instead of beginnings of valid text; between: called often, what it raises ends everything.
    """
    begun = time.monotonic()
    model.eval()
    with voice.phase("measuring strengths"):
        dial = dialled(model, name, texts, objective, batch=run.batch, between=between)
    with voice.phase("measuring layers"):
        found = {
            "base_parameters": n_base_parameters(model),
            "dial": dial,
            "layers": layers(model, name, voice),
            "preview": preview(texts["train"].windows, tokenizer),
        }
    between()
    with voice.phase("sampling"):
        found["samples"] = samples(
            model, name, tokenizer, texts, prompts=prompts, seed=run.seed, voice=voice, between=between
        )
    return {**found, "report_seconds": time.monotonic() - begun}


def dialled(
    model: nn.Module, name: str, texts: Texts, objective: Objective, *, batch: int, between: Between
) -> dict[str, Any]:
    """The dial, with the strength chosen on valid text and measured on test text; halves of one text where there is no other."""
    chosen_on, reported = (
        ("valid text", "test text")
        if "test" in texts
        else ("half of the valid text", "the other half of the valid text")
    )
    target = (
        (texts["valid"].windows, texts["test"].windows)
        if "test" in texts
        else _halves(texts["valid"].windows)
    )
    known = _halves(texts["known"].windows) if "known" in texts else ((), ())
    choosing, points = (
        _points(model, name, sample(t, WINDOWS), sample(k, WINDOWS), objective, batch=batch, between=between)
        for t, k in zip(target, known, strict=True)
    )
    return {
        "recommended": _recommended(choosing),
        "chosen_on": chosen_on,
        "text": reported,
        "apart": target[0] is not target[1] and (known[0] is not known[1] or not known[0]),
        "windows": len(sample(target[1], WINDOWS)),
        "chosen_by": choosing,
        "points": points,
    }


def _halves(windows: Sequence[Window]) -> tuple[Sequence[Window], Sequence[Window]]:
    """Every other window, and the rest; the same twice of a single one."""
    return (windows[::2], windows[1::2]) if len(windows) > 1 else (windows, windows)


def _points(
    model: nn.Module,
    name: str,
    target: Sequence[Window],
    known: Sequence[Window],
    objective: Objective,
    *,
    batch: int,
    between: Between,
) -> list[dict[str, Any]]:
    if known:
        texts = {"target": target, "known": known}
        return [p._asdict() for p in dial(model, name, texts, objective, batch=batch, between=between)]
    found = []
    for strength in STRENGTHS:
        with using(model, *([{name: strength}] if strength else [])):
            measured = bits_per_byte(model, target, objective, batch=batch, between=between)
        found.append({"strength": strength, "target_bpb": measured, "known_bpb": None})
    return found


def _recommended(points: Sequence[Mapping[str, Any]]) -> float:
    """As the dial recommends; without known text the strength that learned most, and 1 if none did."""
    if all(p["known_bpb"] is not None for p in points):
        return recommend([Point(**p) for p in points])
    best = min(points, key=lambda p: p["target_bpb"])["strength"]
    return float(best or 1.0)


@torch.no_grad()
def layers(model: nn.Module, name: str, voice: Voice) -> list[dict[str, Any]]:
    """The spectrum of every layer's change, without those that would take too long."""
    work = 0.0
    for site, delta in changes(model, name):
        f = delta.factors(site)
        if f is None or not f.is_product:
            work += site.out * site.in_ * min(site.out, site.in_)
    if work > DENSE:
        voice.say(
            "the report leaves out singular values, which would take minutes for changes that are no product: see veneer inspect"
        )
        return []
    return [{**s.as_dict(), "values": s.values[:VALUES]} for s in spectra(model, name)]


def preview(windows: Sequence[Window], tokenizer: Any) -> list[list[list[Any]]]:
    """The beginnings of the first rows, each a list of [text of a token, whether it is learned]."""
    found = []
    every = [s for w in windows[:LOOKED] for s in w]
    whole = [
        s for s in every if s.inputs[0] == tokenizer.bos_token_id
    ]  # from where a row begins, if that can be seen
    for s in (whole or every)[:SHOWN]:
        ids, learned = _learned(s)
        found.append(
            [
                [text, was]
                for text, was in zip(pieces(ids[: TOKENS["preview"]], tokenizer), learned, strict=False)
            ]
        )
    return found


def _learned(s: Segment) -> tuple[list[int], list[bool]]:
    """The tokens of a segment, and whether each is learned; its first never is."""
    end = [int(s.labels[-1])] if s.labels[-1] != IGNORED else []
    return [*s.inputs.tolist(), *end], [False, *(s.labels != IGNORED).tolist()]


def pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token: what it adds to the text so far; nothing for one that leaves a letter unfinished."""
    found, done = [], ""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)
        finished = not text.endswith("\N{REPLACEMENT CHARACTER}") or n == len(ids)
        found.append(text[len(done) :] if finished else "")
        done = text if finished else done
    return found


def samples(
    model: nn.Module,
    name: str,
    tokenizer: Any,
    texts: Texts,
    *,
    prompts: Sequence[str],
    seed: int,
    voice: Voice,
    between: Between,
) -> dict[str, Any] | None:
    """Prompts continued by the base and by the adapted model, with the same draws; None if the model cannot write."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 1 << 20
    written = min(TOKENS["written"], longest // 2)
    rows: list[dict[str, Any]] = [{"prompt": p} for p in prompts]
    rows = rows or _prompts(
        texts["valid"].windows, tokenizer, written, min(TOKENS["longest prompt"], longest - written - 8)
    )
    try:
        for row in rows:
            for key, strengths in (("before", []), ("after", [name])):
                between()
                with using(model, *strengths):
                    row[key] = continuation(
                        model,
                        tokenizer,
                        row["prompt"],
                        seed=seed,
                        temperature=TEMPERATURE,
                        top_p=0.95,
                        max_new_tokens=written,
                    )
    except VeneerError as e:
        voice.say(f"the report has no samples: {e}")
        return None
    source = "Prompts as given" if prompts else "Prompts from valid text, which was not trained on"
    return {"source": source, "temperature": TEMPERATURE, "tokens": written, "rows": rows}


def _prompts(windows: Sequence[Window], tokenizer: Any, written: int, longest: int) -> list[dict[str, Any]]:
    """Beginnings of valid text and how they go on: what is before the first learned token, or the first tokens of plain text."""
    found = []
    for (s,) in sample([(s,) for w in windows for s in w], SAMPLES):
        ids, learned = _learned(s)
        first = learned.index(True)
        start = first if first > 1 else min(TOKENS["prompt"], len(ids) // 2)
        prompt = tokenizer.decode(
            ids[max(0, start - max(1, longest)) : start], clean_up_tokenization_spaces=False
        )
        truth = tokenizer.decode(ids[start : start + written], clean_up_tokenization_spaces=False)
        found.append(
            {
                "prompt": prompt.removeprefix(tokenizer.bos_token or ""),
                "truth": truth.removesuffix(tokenizer.eos_token or ""),
            }
        )
    return found
