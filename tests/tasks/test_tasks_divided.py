"""Every task in two processes has the losses that it has in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import heads, pipelines, senses, shared_runs, tiny
from support.rows import CASES

from veneer import tasks
from veneer.train.world import ALONE

# The others differ from one of these by a formula or a head alone: -m slow has all.
FEW = ("masked-lm", "sequence-classification", "text-to-text", "embeddings", "dpo", "kto")
SENSES = ("image-classification", "speech-recognition", "text-to-image")
# Models without dropout, whose draws differ in each process.
STILL: dict[str, dict[str, float]] = {
    "bert": dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "masked": dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "t5": dict(dropout_rate=0.0),
    "lm": {},
}
SHORT: dict[str, Any] = dict(
    options={"rank": 4}, steps=3, batch=6, accumulate=2, eval_every=3, save_every=3, lr=3e-3
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


def on_text(place: Path, task: str, out: Path) -> dict[str, Any]:
    make, kind = CASES.get(task, CASES["dpo"])
    if not (place / kind).exists():
        heads.base(place / kind, kind, **STILL[kind])
    if not (place / task).exists():
        (place / task).mkdir()
        heads.write(place / task, make)
    return heads.settings(place / task, task, out, **{**SHORT, "model": str(place / kind)})


def on_senses(place: Path, task: str, out: Path) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if task == "image-classification":
        senses.picture_base(place / "vit", "vit")
        for part, seed in (("train", 1), ("valid", 2)):
            senses.pictured(place / "shapes" / part, 6, seed)
        model, data = place / "vit", place / "shapes"
    elif task == "speech-recognition":
        senses.whisper(place / "whisper")
        model, data = place / "whisper", senses.spoken(place / "clips", 14, 1)
        own = {"task_options": {"language": "en"}}
    else:
        pytest.importorskip("diffusers")
        pipelines.save("StableDiffusion", place / "sd")
        model, data = place / "sd", senses.coloured(place / "walls", 14)
    return senses.settings(model, task, data, out, **{**SHORT, **own})


@pytest.mark.parametrize(
    "task",
    [t if t in (*FEW, *SENSES) else pytest.param(t, marks=pytest.mark.slow) for t in tasks.available()],
)
def test_a_task_in_two_processes_has_the_losses_of_one(task, place, tmp_path, two):
    given = (on_senses if task in SENSES else on_text)(place, task, tmp_path / "alone")
    shared_runs.whole(ALONE, given)
    two.call("support.shared_runs:whole", {**given, "out": str(tmp_path / "run")})
    one, other = tiny.metrics(tmp_path / "alone"), tiny.metrics(tmp_path / "run")
    assert [line["step"] for line in one] == [line["step"] for line in other]
    assert sum("loss" in line for line in one) == 3
    for a, b in zip(one, other, strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6, abs=1e-6)
            assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)
            assert (b["labels"], b["tokens"]) == (a["labels"], a["tokens"])


def test_hidden_tokens_are_drawn_alike_after_another_number_of_processes(place, tmp_path, two):
    given = on_text(place, "masked-lm", tmp_path / "alone")
    given |= {"steps": 6, "eval_every": 6, "resume": True}
    shared_runs.until(ALONE, given, 99)
    changing = {**given, "out": str(tmp_path / "run")}
    shared_runs.until(ALONE, changing, 2)
    two.call("support.shared_runs:until", changing, 4)
    shared_runs.until(ALONE, changing, 5)
    two.call("support.shared_runs:until", changing, 99)
    one, other = tiny.metrics(tmp_path / "alone"), tiny.metrics(tmp_path / "run")
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (one, other)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == 6
