"""Small options of a training: warm-up in steps, NEFTune, early stopping, a running mean, samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models, tiny
from support.objectives import causal_lm
from support.resuming import Killed, assert_same, killed_at
from torch import nn

import veneer
from veneer.errors import ConfigError
from veneer.models import pretrained
from veneer.optim.base.groups import Part
from veneer.runs.fit import fit
from veneer.runs.fit_many import fit_many
from veneer.runs.texts import texts
from veneer.train.loop.progress import Notes
from veneer.train.loop.schedule import Pace
from veneer.train.mean import Mean
from veneer.train.noise import dropping, noisy
from veneer.train.run import Run


def run(folder: Path, **changed: Any) -> Any:
    return fit(Run.from_dict(tiny.settings(folder, **changed)), progress=False)


def lines(folder: Path, key: str) -> dict[int, Any]:
    return {line["step"]: line[key] for line in tiny.metrics(folder) if key in line}


@pytest.mark.parametrize(("warmup", "rising"), [(0.25, 2), (3, 3), (0, 0), (20, 9)])
def test_warm_up_is_a_share_or_a_number_of_steps(warmup, rising):
    assert Run(data="x", warmup=warmup).rising(10) == rising


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"warmup": 1.5}, "warmup must be a share below 1 or a whole number of steps, got 1.5"),
        ({"warmup": 8, "steps": 8}, "warmup must be less than steps, got 8 and 8"),
        ({"ema": 1.0}, "ema must be in [0, 1), got 1"),
        ({"neftune": -1.0}, "neftune must be 0 or more, got -1"),
        ({"attention_dropout": 1.0}, "attention_dropout must be in [0, 1), got 1"),
        ({"patience": 0}, "patience must be 1 or more, got 0"),
        (
            {"patience": 2, "valid": "none"},
            "patience needs valid text to improve on, which valid='none' lacks; leave one of them out",
        ),
        (
            {"neftune": 5.0, "cache_frozen": True},
            "cache_frozen computes embeddings once, and neftune changes them every step;",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ConfigError) as e:
        Run(data="x", **given)
    assert message in str(e.value)


def test_the_rate_rises_over_that_many_steps(tmp_path):
    rates = lines(run(tmp_path, warmup=4, steps=8, schedule="constant").folder, "lr")
    assert [rates[s] / 1e-2 for s in range(1, 9)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_noise_is_uniform_within_its_bound_and_in_training_alone():
    model, ids = models.llama(), torch.arange(60).view(3, 20)
    plain = model.get_input_embeddings()(ids)
    handle = noisy(model.train(), alpha=5.0)
    torch.manual_seed(0)
    noise = (model.get_input_embeddings()(ids) - plain).detach().flatten()
    most = 5.0 / math.sqrt(20 * plain.shape[-1])
    assert noise.abs().max() <= most and noise.abs().max() > 0.95 * most
    assert abs(noise.mean()) < 4 * most / math.sqrt(3 * len(noise)) and noise.std() == pytest.approx(
        most / math.sqrt(3), rel=0.1
    )
    assert torch.equal(model.eval().get_input_embeddings()(ids), plain)
    handle.remove()
    assert torch.equal(model.train().get_input_embeddings()(ids), plain)
    with pytest.raises(
        ConfigError, match="neftune needs a model with token embeddings, got Linear; leave it"
    ):
        noisy(nn.Linear(2, 2), 5.0)


def test_noise_changes_steps_and_no_figure(tmp_path):
    plain = run(tmp_path, steps=4, out=str(tmp_path / "plain"))
    noised = run(tmp_path, steps=4, neftune=5.0, out=str(tmp_path / "noised"))
    assert plain.learned.before == noised.learned.before
    assert lines(plain.folder, "loss")[1] != lines(noised.folder, "loss")[1]


def test_attention_drops_its_weights_in_training_alone():
    model, ids = models.llama(), torch.arange(60).view(3, 20)
    model.eval()
    plain = model(ids).logits
    undo = dropping(model, 0.5)
    assert torch.equal(model(ids).logits, plain)
    torch.manual_seed(0)
    one, other = model.train()(ids).logits, model(ids).logits
    assert not torch.allclose(one, plain) and not torch.allclose(one, other)
    undo()
    torch.testing.assert_close(model.train()(ids).logits, plain)
    with pytest.raises(ConfigError, match="attention layers with dropout, got Linear; leave it out"):
        dropping(nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_attention_dropout_changes_steps_and_no_figure(tmp_path, method):
    own = {"steps": 2, "method": method, "options": {}}
    plain = run(tmp_path, **own, out=str(tmp_path / "plain"))
    dropped = run(tmp_path, **own, attention_dropout=0.3, out=str(tmp_path / "dropped"))
    assert plain.learned.before == dropped.learned.before
    assert lines(plain.folder, "loss")[1] != lines(dropped.folder, "loss")[1]
    two = [Run.from_dict(tiny.settings(tmp_path, out=str(tmp_path / n), attention_dropout=0.1)) for n in "ab"]
    with pytest.raises(ConfigError, match="attention_dropout acts on the rows of all runs; train them alone"):
        fit_many(two, progress=False)


def test_joint_training_has_no_noise(tmp_path):
    two = [Run.from_dict(tiny.settings(tmp_path, out=str(tmp_path / n), neftune=5.0)) for n in "ab"]
    with pytest.raises(
        ConfigError, match="neftune changes embeddings, which all runs share here; train them"
    ):
        fit_many(two, progress=False)


def test_patience_counts_evaluations_after_the_best():
    pace = Pace(20, 1.0, "cosine", 0, 4, 4, 3, patience=2)
    assert [pace.is_over(step, 4) for step in (4, 8, 12, 16)] == [False, False, True, True]
    assert not pace.is_over(20, None) and not pace._replace(patience=None).is_over(20, 4)


def test_a_training_ends_early_once_valid_text_no_longer_improves(tmp_path):
    """At a rate of nearly 0 every evaluation has the same figure, which does not beat the first."""
    result = run(tmp_path, lr=1e-30, patience=2, eval_every=2, steps=14)
    found = json.loads((result.folder / "results.json").read_text())
    assert (found["steps"], found["best_step"]) == (6, 2)
    assert (
        "valid text has not improved for 2 evaluations: the training ends after step 6 of 14"
        in found["notes"]
    )


def test_the_mean_is_the_formula():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, 2))
    mean = Mean([Part("p", p, "A")], 0.75)
    expected, steps = p.detach().double().clone(), []
    for _ in range(4):
        steps.append(torch.randn(3, 2))
        p.data = steps[-1].clone()
        mean.update()
        expected = 0.75 * expected + 0.25 * steps[-1].double()
    torch.testing.assert_close(mean.values[0].double(), expected, rtol=0, atol=1e-6)
    with mean.used():
        assert torch.equal(p.detach(), mean.values[0])
    assert torch.equal(p.detach(), steps[-1])
    mean.take()
    assert torch.equal(p.detach(), mean.values[0])


def test_the_mean_is_measured_and_saved(tmp_path):
    result = run(tmp_path, ema=0.9, steps=6, eval_every=3, out=str(tmp_path / "mean"))
    plain = run(tmp_path, steps=6, eval_every=3, out=str(tmp_path / "plain"))
    assert lines(result.folder, "loss") == lines(plain.folder, "loss")  # the training itself is the same
    assert result.learned.after != plain.learned.after
    given = Run.from_dict(tiny.settings(tmp_path))
    model = veneer.load(pretrained.causal_lm(given.model, torch.float32, torch.device("cpu")), result.adapter)
    task = causal_lm(pretrained.tokenizer(given.model), **tiny.reading(given))
    found = {"valid": texts.prepare(texts.read(given, ["valid"])["valid"], task, Notes(), "valid")}
    (figure,) = task.measure(model, texts.evaluated(found, given, task)["valid"], batch=2)
    assert figure.value == pytest.approx(result.learned.after, rel=1e-6)


def test_a_resumed_training_goes_on_with_mean_and_noise_bit_for_bit(tmp_path, monkeypatch):
    given = tiny.settings(tmp_path, ema=0.8, neftune=5.0)
    whole = fit(Run.from_dict({**given, "out": str(tmp_path / "whole")}), progress=False).folder
    with monkeypatch.context() as patch:
        killed_at(patch, 7)
        with pytest.raises(Killed):
            fit(Run.from_dict(given), progress=False)
    fit(Run.from_dict({**given, "resume": True}), progress=False)
    assert_same(given, whole)


def test_samples_are_written_at_every_evaluation_and_change_nothing(tmp_path):
    result = run(tmp_path, samples=2, steps=4, eval_every=2, out=str(tmp_path / "samples"))
    plain = run(tmp_path, steps=4, eval_every=2, out=str(tmp_path / "plain"))
    samples = lines(result.folder, "samples")
    assert sorted(samples) == [0, 2, 4] and all(len(some) == 2 for some in samples.values())
    assert all(one["prompt"] and one["text"] for some in samples.values() for one in some)
    assert samples[0] != samples[4]
    assert [line for line in tiny.metrics(result.folder) if "samples" not in line] == tiny.metrics(
        plain.folder
    )
