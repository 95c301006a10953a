"""Label smoothing: what is learned has it, what is measured has not."""

from __future__ import annotations

import functools
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import models, tiny
from support.objectives import causal_lm

import veneer
from veneer.data.pack import IGNORED, Segment
from veneer.errors import ConfigError
from veneer.optim.base import groups
from veneer.runs.fit import fit
from veneer.tasks.text import next_token
from veneer.tasks.text.bits import bits_per_byte
from veneer.train.loop.step import Learner, under_autocast
from veneer.train.run import Run
from veneer.train.speed import compile_settings, compiling

OBJECTIVES = {
    "plain": lambda: next_token.loss,
    "compiled": lambda: compile_settings.lean(
        functools.partial(next_token.loss, kernel=compiling.compiled_kernel())
    ),
    "in full precision under autocast": lambda: under_autocast(next_token.loss, torch.device("cpu")),
}


def windows() -> list[tuple[Segment]]:
    draw, found = torch.Generator().manual_seed(0), []
    for n in (9, 6):
        inputs, labels = torch.randint(models.VOCABULARY, (2, n), generator=draw)
        labels[: n // 3] = IGNORED
        found.append((Segment(inputs, labels, (labels != IGNORED).float() * 3),))
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_lowers_pytorchs_smoothed_loss_and_what_is_measured_is_without(name):
    model = veneer.attach(models.llama(), rank=2)
    models.randomise(model)
    parts = groups.of_adapter(model, "default")
    learner = Learner(model, parts, groups.adamw(parts, {}), causal_lm(), OBJECTIVES[name](), 0.0, 0.0, 0.5)
    batch = learner.batch(windows(), torch.device("cpu"))
    learned = batch["labels"] != IGNORED
    logits, labels = model(input_ids=batch["input_ids"]).logits[learned], batch["labels"][learned]
    expected = F.cross_entropy(logits, labels, label_smoothing=0.5)
    gradients = torch.autograd.grad(expected, [p.parameter for p in parts])
    sharp = float(F.cross_entropy(logits, labels, reduction="sum").detach())
    tolerance = 2e-2 if "autocast" in name else 1e-5
    with compiling.eagerly():
        measured = bits_per_byte(model, windows(), learner.objective, batch=2)
    assert measured == pytest.approx(sharp / math.log(2) / (3 * len(labels)), rel=tolerance)
    outcome = learner.step([windows()], 1e-3)
    assert outcome.loss == pytest.approx(float(expected.detach()), rel=tolerance)
    assert outcome.norm == pytest.approx(
        float(torch.cat([g.flatten() for g in gradients]).norm()), rel=tolerance
    )


def short(folder: Path, name: str, **changed: Any) -> dict[str, Any]:
    return tiny.settings(folder, out=str(folder / name), steps=3, eval_every=3, **changed)


def test_a_run_records_it_goes_on_with_it_and_measures_without(tmp_path):
    sharp, smooth, halted = (
        short(tmp_path, "sharp"),
        *(short(tmp_path, n, label_smoothing=0.3) for n in ("smooth", "halted")),
    )
    for given in (sharp, smooth):
        fit(Run.from_dict(given), progress=False)
    assert json.loads((tmp_path / "smooth" / "config.json").read_text())["run"]["label_smoothing"] == 0.3
    one, other = (tiny.metrics(tmp_path / name) for name in ("sharp", "smooth"))
    assert one[0] == other[0] and "valid_bpb" in one[0]  # before the first step both are the base
    assert one[1]["loss"] != other[1]["loss"] and one[-1]["valid_bpb"] != other[-1]["valid_bpb"]
    assert tiny.train(halted, signal_at=(2, signal.SIGTERM)) == 143
    with pytest.raises(ConfigError, match=r"config: label_smoothing: 0\.3 -> 0\.1"):
        fit(Run.from_dict({**halted, "resume": True, "label_smoothing": 0.1}), progress=False)
    fit(Run.from_dict({**halted, "resume": True}), progress=False)
    assert tiny.metrics(tmp_path / "halted") == other
