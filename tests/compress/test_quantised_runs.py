"""Runs on quantised bases, from `fit` to `merge`: what each command makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import models, tiny
from support.objectives import causal_lm
from support.step_memory import SHAPE, real_step

import veneer
from veneer.adapt.attached import changes
from veneer.analyse.cost import simulate
from veneer.cli.frame import main
from veneer.errors import ConfigError
from veneer.models import adapted, pretrained
from veneer.runs.fit import fit
from veneer.sites.quantised import formats
from veneer.train.run import Run
from veneer.verbs.plan import smaller
from veneer.verbs.plan.plan import plan
from veneer.verbs.verify import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


def trained(folder: Path, name: str, **changed: object) -> Path:
    """A run's folder, trained once."""
    out = folder / name
    if not out.exists():
        fit(Run(**tiny.settings(folder, out=str(out), quantise="nf4", **changed)), progress=False)
    return out


def test_a_run_learns_on_four_bits_and_its_adapter_knows_its_base(folder, capsys):
    out = trained(folder, "nf4")
    results = json.loads((out / "results.json").read_text())
    assert results["learned"]["after"] < results["learned"]["before"]
    assert any(note.startswith("the base in nf4: ") for note in results["notes"])
    manifest = json.loads((out / "adapter" / "veneer.json").read_text())
    assert manifest["base"]["quantised"] == ["nf4"]
    card = (out / "adapter" / "README.md").read_text()
    assert "veneer.quantise(model, 'nf4')" in card and "It was trained on a base in nf4" in card
    assert all(c.passed is not False for c in verify(str(out)).checks)
    opened, _ = adapted.open_all([str(out)])
    assert set(formats(opened.model).values()) == {"nf4"} and len(formats(opened.model)) == 14
    assert main(["generate", "the cat", "--adapter", str(out), "--tokens", "3"]) == 0
    assert main(["inspect", str(out)]) == 0
    assert (
        main(
            [
                "eval",
                str(folder / "base"),
                "--adapter",
                str(out),
                "--data",
                str(folder / "valid.txt"),
                "--length",
                "32",
            ]
        )
        == 0
    )
    capsys.readouterr()


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(folder):
    whole = trained(folder, "nf4")
    half = tiny.settings(folder, out=str(folder / "half"), quantise="nf4", report=False)
    assert tiny.train(half, signal_at=(7, 15)) == 143
    fit(Run(**{**half, "resume": True}), progress=False)
    assert tiny.metrics(folder / "half") == tiny.metrics(whole)


def test_merging_into_bfloat16_keeps_the_change_and_into_four_bits_says_what_is_lost(folder, capsys):
    out = trained(folder, "nf4")
    assert main(["merge", str(out), "--out", str(folder / "plain"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] < 0.2
    merged = pretrained.causal_lm(str(folder / "plain"), torch.float32, torch.device("cpu"))
    opened, _ = adapted.open_all([str(out)])
    assert not formats(merged)
    a, b = (m(**models_inputs()).logits for m in (merged, opened.model))
    assert (a - b).norm() < 0.05 * b.norm()
    code = main(["merge", str(out), "--out", str(folder / "packed"), "--dtype", "nf4"])
    told = capsys.readouterr().err
    assert (
        code == 3
        and "would be lost in the merge" in told
        and "bfloat16 is finer than the base's quantised format" in told
    )
    assert not (folder / "packed").exists()
    assert main(["merge", str(out), "--out", str(folder / "packed"), "--dtype", "nf4", "--force"]) == 0
    again = pretrained.causal_lm(str(folder / "packed"), torch.float32, torch.device("cpu"))
    assert set(formats(again).values()) == {"nf4"} and torch.isfinite(again(**models_inputs()).logits).all()
    assert main(["generate", "the cat", "--model", str(folder / "packed"), "--tokens", "3"]) == 0
    assert main(["merge", str(out), "--out", str(folder / "other"), "--dtype", "int8"]) == 2
    assert (
        "dtype int8 is for layers in that format, which model.layers.0.self_attn.q_proj"
        in capsys.readouterr().err
    )


def models_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(16)[None]}


def test_what_other_programs_get_of_an_adapter_on_four_bits_is_made_on_four_bits(folder, capsys):
    out = trained(folder, "dora", method="dora", steps=4)
    assert (
        main(
            [
                "convert",
                str(out),
                "--to",
                "vllm",
                "--model",
                str(folder / "base"),
                "--rank",
                "8",
                "--out",
                str(folder / "vllm"),
            ]
        )
        == 0
    )
    assert (
        main(["export", str(folder / "base"), "--adapter", str(out), "--out", str(folder / "exported")]) == 0
    )
    exported = pretrained.causal_lm(str(folder / "exported"), torch.float32, torch.device("cpu"))
    opened, _ = adapted.open_all([str(out)])
    a, b = (m(**models_inputs()).logits for m in (exported, opened.model))
    assert (a - b).norm() < 0.05 * b.norm()
    capsys.readouterr()


@pytest.mark.parametrize("start", ["qpissa", "loftq"])
def test_a_run_that_starts_around_quantisation_keeps_its_base(folder, start):
    out = trained(folder, start, options={"rank": 4, "init": start}, steps=4)
    assert adapted.base_of([adapted.Wanted("a", out, 1.0)]) == str(out / "base")
    opened, _ = adapted.open_all([str(out)])
    plain = veneer.quantise(pretrained.causal_lm(str(folder / "base"), torch.float32, torch.device("cpu")))
    site, delta = changes(opened.model, start)[0]
    assert len(formats(opened.model)) == 14 and not torch.equal(
        site.weight(), plain.get_submodule(site.name).weight
    )
    assert delta.A0 is None
    assert main(["report", str(out), "--measure"]) == 0
    found = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert 'veneer.load_quantised(model, "../base")' in (out / "adapter" / "README.md").read_text()
    assert found["base_model_name_or_path"] == str(out / "base") and found["r"] == 4


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_step_by_shapes_takes_what_a_real_one_does(name):
    model = veneer.attach(veneer.quantise(models.llama(), name), rank=4)
    foreseen = simulate.step(model, SHAPE, causal_lm()).memory
    live, saved = real_step(model, model.parameters())
    assert (
        foreseen.weights
        < simulate.step(veneer.attach(models.llama(), rank=4), SHAPE, causal_lm()).memory.weights
    )
    assert foreseen.activations == pytest.approx(saved.kept.peak, rel=0.02)
    assert foreseen.growth - foreseen.optimiser == pytest.approx(live.made.peak, rel=0.05)


def test_a_plan_has_both_columns_and_counts_the_base_as_it_was(folder, monkeypatch):
    for other in ("_recompute", "_batch", "_precision", "_length"):
        monkeypatch.setattr(smaller, other, lambda *given: iter(()))
    run = tiny.settings(folder, out=str(folder / "none"), batch=1, length=8, options={"rank": 16})
    packed = {**run, "quantise": "nf4", "options": {"rank": 16, "init": "loftq"}}
    found, whole = (plan(Run(**settings), probe=False, progress=False) for settings in (packed, run))
    assert found.base == whole.base and found.full == whole.full
    assert found.memory.weights < 0.7 * whole.memory.weights and found.memory.adapter == whole.memory.adapter
    assert [t.change for t in found.halving] == ["--rank 2"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"method": "full", "quantise": "nf4", "options": {}},
            "quantise nf4 keeps the base as codes, which method 'full' cannot train",
        ),
        (
            {"options": {"init": "loftq"}},
            "init loftq compensates for quantisation and needs a quantised base; add quantise='nf4'",
        ),
        (
            {"options": {"init": "qpissa"}, "quantise": "nf4", "untie": True},
            "init qpissa is for quantised layers, and tied ones are not; leave untie out",
        ),
        ({"quantise": "nf5"}, "quantise must be 'nf4', 'int8' or 'spqr', got 'nf5'; did you mean 'nf4'"),
    ],
)
def test_settings_that_make_no_sense_are_said(settings, told):
    with pytest.raises(ConfigError, match=told):
        Run(data=("x",), **settings)


def test_adapters_of_different_bases_are_not_opened_together(folder):
    out = trained(folder, "nf4")
    if not (folder / "plainly").exists():
        fit(Run(**tiny.settings(folder, out=str(folder / "plainly"), steps=4)), progress=False)
    with pytest.raises(
        ConfigError,
        match=(
            r"bases have different forms \(.*nf4: quantised \(nf4\), .*plainly: plain\); use the adapters "
            r"one"
        ),
    ):
        adapted.open_all([str(out), str(folder / "plainly")])
