"""The demo's second act: questions with one right answer, asked before and after a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from veneer import embedded, tasks
from veneer.adapt.attach import detach
from veneer.adapt.store import store
from veneer.adapt.switch import using
from veneer.analyse.page.demo_report import KNOWN, METRIC
from veneer.data.reading import Reading
from veneer.data.spread import spread
from veneer.runs.dial import Point, recommend
from veneer.runs.texts import sources, texts
from veneer.tasks.text.answering import Question, asked, questions, same_text, text_of
from veneer.train.folder.result import Result
from veneer.train.loop.progress import Notes
from veneer.train.run import Run
from veneer.verbs.demo.judge import Judge

NAMES, LOADED = "names", "asked"
SOURCE, PASSAGES = (f"{embedded.PREFIX}:{name}" for name in (NAMES, "passages"))
OFTEN = 4  # times a name is learned for each time a passage of known text is rehearsed
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ASKED = 200  # questions of the test; a strength is chosen on half as many of validation
LENGTH, BATCH, RANK, RATE = 64, 16, 16, 5e-3
FURTHER = 8  # tokens that an answer may be longer than the true one
LONGER = 2.5  # steps for each step of the first act


class Answered(NamedTuple):
    """The answers at one strength: how many are right, all in order, and the metric on known text."""

    strength: float
    right: int
    answers: list[str]
    known: float


def settings(folder: Path, *, steps: int, seed: int) -> Run:
    """Returns the training. steps: of the first act."""
    own = max(1, round(LONGER * steps))
    return Run(
        data=(f"{SOURCE}@{OFTEN}", PASSAGES),
        valid=(f"{SOURCE}:valid",),
        test=(f"{SOURCE}:test",),
        known=("none",),  # forgetting is measured by the judge, on text without questions
        task="answers",
        options={"rank": RANK},
        lr=RATE,
        steps=own,
        batch=BATCH,
        length=LENGTH,
        overlong="cut",  # a passage may be cut anywhere
        eval_every=own,
        save_every=max(1, own // 2),
        eval_windows=ASKED // 4,
        seed=seed,
        out=str(folder / NAMES),
        resume=True,
        report=False,  # the demo has a page of its own
    )


def row(judge: Judge, result: Result) -> dict[str, Any]:
    """Returns the entry of the training for results.json."""
    store.load(judge.model, result.adapter, LOADED)
    try:
        chosen = _chosen(answered(judge, "valid", ASKED // 2))
        every = prepared(judge, "test", ASKED)
        points = answered(judge, "test", ASKED)
    finally:
        detach(judge.model)
    before, after = points[0], points[-1]
    texts_of = [tuple(text_of(part, judge.tokenizer) for part in q) for q in every]
    return {
        "asked": len(every),
        "right_before": before.right,
        "right_after": after.right,
        "dial": [{"strength": p.strength, "right": p.right, KNOWN: p.known} for p in points],
        "recommended_strength": chosen,
        "rows": [
            {"prompt": prompt, "truth": truth, "before": b, "after": a}
            for (prompt, truth), b, a in zip(texts_of, before.answers, after.answers, strict=True)
        ],
        **{k: result.metrics[k] for k in ("steps", "trainable_parameters", "adapter_bytes", "seconds", "lr")},
        "folder": str(result.folder),
    }


def prepared(judge: Judge, split: str, n: int) -> list[Question]:
    """Returns n evenly spaced questions of a split."""
    task = tasks.build("answers", judge.tokenizer, Reading(length=LENGTH))
    rows = spread(sources.rows([f"{SOURCE}:{split}"], split), n)
    return questions(texts.prepare(rows, task, Notes()).examples)


def answered(judge: Judge, split: str, n: int) -> list[Answered]:
    """Returns the answers of the attached adapter to a split's questions at every strength."""
    every, known = prepared(judge, split, n), judge.text("known", split)
    truths = [text_of(q.truth, judge.tokenizer) for q in every]
    found = []
    for strength in STRENGTHS:
        with using(judge.model, *([{LOADED: strength}] if strength else [])):
            answers = asked(judge.model, judge.tokenizer, every, batch=n, further=FURTHER)
            on_known = (
                judge.task.measure(judge.model, known, batch=8)[0].value
                if strength
                else judge.of_base("known", split)
            )
        right = sum(map(same_text, answers, truths))
        found.append(Answered(strength, right, answers, on_known))
    return found


def _chosen(points: Sequence[Answered]) -> float:
    """Returns the strength to recommend by the share of wrong answers and the forgetting."""
    n = len(points[0].answers)
    return recommend([Point(p.strength, 1 - p.right / n, p.known) for p in points], METRIC)
