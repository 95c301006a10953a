"""AdaLoRA: importance, budget and the removal of triplets against the paper's formulas; PEFT; in a run."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import peft
import pytest
import torch
from oracles import adalora as oracle
from safetensors.torch import load_file, save_file
from support import models, tiny
from support.resuming import resumes_bit_for_bit

import veneer
from veneer.adapt.attached import changes
from veneer.errors import ConfigError, FormatError
from veneer.runs.fit import fit
from veneer.train import allocation
from veneer.train.run import Run

TO = ["q_proj", "k_proj", "down_proj"]


def adapted(**options):
    given = {"rank": 4, "target": 2, "begin": 0.0, "end": 0.2, "every": 2, **options}
    return veneer.attach(models.llama(), "adalora", to=TO, **given)


def deltas(model):
    return [delta for _, delta in changes(model, "default")]


def train(model, steps):
    """Steps of Adam on one loss; returns the optimiser, and the ranks after every step."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    allocation.hold(model, optimiser, steps)
    seen = []
    for _ in range(steps):
        optimiser.zero_grad()
        model(**models.inputs(model)).logits.square().mean().backward()
        optimiser.step()
        seen.append([len(d.E) for d in deltas(model)])
    return optimiser, seen


def test_the_budget_is_the_papers_curve():
    for step in range(1, 101):
        expected = oracle.budget(step, 100, 72, 48, 10, 30)
        assert allocation.budget(step, 100, 72, 48, 0.1, 0.3) == int(expected + 1e-9), step
    assert allocation.budget(10, 100, 72, 48, 0.1, 0.3) == 72
    assert allocation.budget(70, 100, 72, 48, 0.1, 0.3) == 48


def test_importance_follows_the_papers_averages():
    model = adapted().double()
    delta, optimiser = (
        deltas(model)[0],
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
    )
    own = {n: oracle.Importance(tuple(delta.get_parameter(n).shape)) for n in "AEB"}
    for _ in range(4):
        optimiser.zero_grad()
        model(**models.inputs(model)).logits.square().mean().backward()
        optimiser.step()
        for n, average in own.items():
            p = delta.get_parameter(n)
            average.see(p.detach().numpy(), p.grad.numpy())
        delta.observe()
    expected = oracle.triplets(*(own[n].score() for n in "AEB"))
    assert expected.max() > 0
    np.testing.assert_allclose(delta.importance().numpy(), expected, rtol=1e-10)


def test_the_regulariser_is_the_gradient_of_its_formula():
    model = adapted(orthogonality=0.3).double()
    delta = deltas(model)[0]
    A, B = delta.A.detach().clone().requires_grad_(), delta.B.detach().clone().requires_grad_()
    eye = torch.eye(4).double()
    loss = (A @ A.mT - eye).square().sum() + (B.mT @ B - eye).square().sum()
    (0.3 * loss).backward()
    for p in (delta.A, delta.B):
        p.grad = torch.ones_like(p)
    delta.regularise()
    torch.testing.assert_close(delta.A.grad - 1, A.grad)
    torch.testing.assert_close(delta.B.grad - 1, B.grad)


def test_ranks_fall_to_the_budget_and_the_best_triplets_stay():
    model = adapted()
    before = copy.deepcopy(model)
    optimiser, seen = train(model, 10)
    assert sum(seen[0]) == 24 and sum(seen[-1]) == 12 and min(seen[-1]) >= 1
    assert all(sum(b) <= sum(a) for a, b in itertools.pairwise(seen))
    assert len(set(seen[-1])) > 1, "layers compete for the budget"
    for delta in deltas(model):
        for p in delta.parameters():
            assert optimiser.state[p]["exp_avg"].shape == p.shape
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in before.parameters())


def test_a_cut_keeps_exactly_the_most_important_ones():
    model = adapted()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    found = deltas(model)
    model(**models.inputs(model)).logits.square().mean().backward()
    optimiser.step()
    for delta in found:
        delta.observe()
        delta.steps += 8  # on to a step that cuts to the end's budget
    scores = [delta.importance() for delta in found]
    rows = [delta.A.detach().clone() for delta in found]
    firsts = {(i, int(s.argmax())) for i, s in enumerate(scores)}
    rest = sorted(((float(s), i, j) for i, own in enumerate(scores) for j, s in enumerate(own)), reverse=True)
    wanted = firsts | {
        (i, j) for _, i, j in [r for r in rest if (r[1], r[2]) not in firsts][: 12 - len(found)]
    }
    allocation.allocate(found, optimiser, 10)
    for i, delta in enumerate(found):
        own = sorted(j for k, j in wanted if k == i)
        assert torch.equal(delta.A, rows[i][own])


def test_files_of_peft_go_both_ways(tmp_path):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=3, target_modules=TO)
    theirs = peft.get_peft_model(models.llama(), config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.add_(0.3 * torch.randn(p.shape, generator=draw))
    theirs.peft_config["default"].rank_pattern = {
        f"model.layers.{i}.mlp.down_proj.lora_E": [True, False, True, False] for i in (0, 1)
    }
    theirs.base_model.resize_modules_by_rank_pattern(theirs.peft_config["default"].rank_pattern, "default")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = veneer.load(models.llama(), tmp_path / "theirs")
    assert {len(d.E) for d in deltas(ours)} == {2, 4} and {d.options["target"] for d in deltas(ours)} == {2}
    torch.testing.assert_close(models.output(ours), models.output(theirs), rtol=1e-5, atol=1e-5)
    model = adapted()
    train(model, 10)
    veneer.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "ours")
    torch.testing.assert_close(models.output(again), models.output(model), rtol=1e-5, atol=1e-5)
    back = veneer.load(models.llama(), tmp_path / "ours")
    assert [len(d.E) for d in deltas(back)] == [len(d.E) for d in deltas(model)]
    torch.testing.assert_close(models.output(back), models.output(model), rtol=1e-6, atol=1e-6)


def test_a_convolutions_triplets_are_kept_in_our_own_file(tmp_path):
    model = veneer.attach(models.conv_net(), "adalora", rank=4, target=2, to=["first"])
    models.randomise(model)
    (delta,) = deltas(model)
    delta.cut(torch.tensor([0, 3]))
    veneer.save(model, tmp_path)
    again = veneer.load(models.conv_net(), tmp_path)
    assert len(deltas(again)[0].E) == 2 and torch.equal(models.output(again), models.output(model))


@pytest.mark.parametrize("lost", ["A", "B", "E"])
def test_a_tensor_missing_from_our_own_file_is_named(lost, tmp_path):
    model = veneer.attach(models.conv_net(), "adalora", rank=4, target=2, to=["first"])
    models.randomise(model)
    veneer.save(model, tmp_path)
    kept = load_file(tmp_path / "delta.safetensors")
    del kept[f"first.{lost}"]
    save_file(kept, tmp_path / "delta.safetensors")
    with pytest.raises(FormatError, match=rf"- missing: first\.{lost} \("):
        veneer.load(models.conv_net(), tmp_path)


def test_a_run_shrinks_saves_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    options = {"rank": 4, "target": 2, "every": 2, "begin": 0.0, "end": 0.2}
    given = tiny.settings(
        tmp_path,
        out=str(tmp_path / "run"),
        steps=10,
        save_every=4,
        eval_every=10,
        method="adalora",
        options=options,
        lr=0.02,
    )
    resumes_bit_for_bit(given, tmp_path / "whole", monkeypatch, 7)
    record = json.loads((tmp_path / "run" / "adapter" / "veneer.json").read_text())
    ranks = [entry["own"]["kept"] for entry in record["sites"].values()]
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 1
    with pytest.raises(ConfigError, match="ema averages parameters of one size, and adalora's shrink"):
        fit(Run.from_dict({**given, "out": str(tmp_path / "ema"), "ema": 0.9}), progress=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target": 5}, "target must be from 1 to the rank 4, got 5"),
        ({"begin": 0.6, "end": 0.4}, "begin and end must be shares with a sum below 1, got 0.6 and 0.4"),
        ({"every": 0}, "every must be 1 or more steps, got 0"),
        ({"orthogonality": -1.0}, "orthogonality must be 0 or more, got -1.0"),
    ],
)
def test_impossible_options_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        adapted(**options)


@pytest.mark.parametrize(("found", "kept"), [(3, 3), (4, 4), (9, 4)])
def test_a_change_takes_the_rank_of_a_file_up_to_its_own(found, kept):
    delta = deltas(adapted())[0]
    before = {n: t.clone() for n, t in delta.state_dict().items()}
    delta.resize({"E": torch.Size([found, 1])})
    for n, dim in (("A", 0), ("B", 1), ("E", 0)):
        for lead in ("", "mean_", "spread_"):
            t, own = delta.state_dict()[lead + n], before[lead + n]
            assert t.shape[dim] == kept and t.shape[1 - dim] == own.shape[1 - dim]
            assert torch.equal(t, own) == (kept == 4)


def test_a_step_without_gradients_of_a_factor_counts_and_leaves_its_averages():
    delta = deltas(adapted())[0]
    delta.E.grad = torch.ones_like(delta.E)
    delta.E.data.fill_(2.0)
    delta.observe()
    assert delta.steps == 1 and not delta.mean_A.any() and not delta.spread_B.any()
    torch.testing.assert_close(delta.mean_E, torch.full((4, 1), 0.15 * 2))
    torch.testing.assert_close(delta.spread_E, torch.full((4, 1), 0.15 * (2 - 0.15 * 2)))
