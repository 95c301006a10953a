"""Training from nothing at low rank: GaLore's steps against projections written out, ReLoRA's restarts,
and the script's ways."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import models
from support.pretraining import SMALL, log
from torch import Tensor, nn

import veneer
from veneer import optim
from veneer.adapt.attached import changes
from veneer.embedded import pretrain
from veneer.errors import ConfigError
from veneer.optim import Trained
from veneer.optim.base import groups
from veneer.optim.galore import follow
from veneer.train import relora

RATE = 0.03


def weight(m: int, n: int) -> groups.Part:
    torch.manual_seed(m)
    return groups.Part("w", nn.Parameter(torch.randn(m, n, dtype=torch.float64)), "matrix")


def gradient(m: int, n: int, seed: int = 0) -> Tensor:
    """Singular values 1, 1/2, 1/4 ..: the leading ones are found exactly in double precision."""
    draw = np.random.default_rng(seed)
    U, _, V = np.linalg.svd(draw.standard_normal((m, n)), full_matrices=False)
    return torch.from_numpy((U * 0.5 ** np.arange(min(m, n))) @ V)


def stepped(
    part: groups.Part, gradients: list[Tensor], decay: float = 0.0, **options: object
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Returns the change of the weight over the steps, and the optimiser's state."""
    before = part.parameter.detach().clone()
    optimiser = optim.make("galore", **options).build(Trained([part]))
    for g in gradients:
        part.parameter.grad = g.clone()
        groups.set_rates(optimiser, RATE, decay)
        optimiser.step()
    return (part.parameter.detach() - before).numpy(), optimiser.state[part.parameter]


# -- GaLore --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(6, 40), (40, 6), (9, 9)])
def test_with_gradient_descent_inside_a_step_is_the_projected_gradient(m, n):
    """W <- W - lr scale P P' G, with P the leading singular vectors of the first gradient, on the smaller
    side."""
    first, second = gradient(m, n), gradient(m, n, 1)
    change, _ = stepped(weight(m, n), [first, second], rank=3, scale=0.5, adam=False)
    U, _, V = np.linalg.svd(first.numpy())
    P = U[:, :3] @ U[:, :3].T if m <= n else V[:3].T @ V[:3]
    total = (first + second).numpy()
    np.testing.assert_allclose(change, -RATE * 0.5 * (P @ total if m <= n else total @ P), atol=1e-10)


@pytest.mark.parametrize(("m", "n"), [(6, 40), (40, 6)])
def test_at_full_rank_it_is_plain_gradient_descent(m, n):
    some = [gradient(m, n, i) for i in range(5)]
    change, _ = stepped(weight(m, n), some, rank=6, period=2, scale=1.0, adam=False)
    np.testing.assert_allclose(change, -RATE * sum(some).numpy(), atol=1e-12)


def test_adam_steps_on_the_projected_gradient():
    G = gradient(6, 40)
    change, state = stepped(weight(6, 40), [G], rank=2, scale=1.0)
    P = state["P"].numpy()
    np.testing.assert_allclose(
        change, -RATE * P @ np.sign(P.T @ G.numpy()), atol=1e-4
    )  # the first step is the sign
    assert {k: tuple(t.shape) for k, t in state.items()} == {
        "P": (6, 2),
        "step": (),
        "exp_avg": (2, 40),
        "exp_avg_sq": (2, 40),
    }


def test_decay_is_that_of_a_weight():
    part = weight(6, 40)
    before = part.parameter.detach().numpy().copy()
    change, _ = stepped(part, [torch.zeros(6, 40, dtype=torch.float64)], decay=0.2, rank=2)
    np.testing.assert_allclose(change, -RATE * 0.2 * before, atol=1e-14)


def test_the_subspace_follows_the_gradient_and_the_moments_turn_with_it():
    old, new = gradient(8, 30), gradient(8, 30, 1)
    state: dict[str, Tensor] = {}
    follow(state, old, 3, "w")
    mean = torch.randn(3, 30, dtype=torch.float64)
    P = state["P"].clone()
    state |= {"exp_avg": mean.clone(), "exp_avg_sq": mean.square()}
    for _ in range(30):
        follow(state, new, 3, "w")
    U = np.linalg.svd(new.numpy())[0][:, :3]
    assert np.linalg.norm(U.T @ state["P"].numpy()) == pytest.approx(
        math.sqrt(3), abs=1e-6
    )  # the same subspace
    assert (state["exp_avg_sq"] >= 0).all()
    # The gradient has not changed: P turns within its subspace, by no symmetric matrix; so do the moments.
    P = P @ torch.linalg.qr(gradient(3, 3, 2)).Q
    state = {"P": P.clone(), "exp_avg": mean.clone(), "exp_avg_sq": mean.square()}
    follow(state, old, 3, "w")
    turn = state["P"].mT @ P
    assert (turn - turn.mT).norm() > 0.1
    torch.testing.assert_close(state["exp_avg_sq"], turn.square() @ mean.square(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state["P"] @ state["exp_avg"], P @ mean, rtol=1e-6, atol=1e-6)


def test_factors_embeddings_and_bad_options():
    parts = groups.of_base(models.llama().requires_grad_(True))
    made = optim.make("galore", rank=4)
    optimiser = made.build(Trained(parts))
    projected = {n for g in optimiser.param_groups for n in g["names"]}
    assert projected == {p.name for p in parts if "proj" in p.name or "lm_head" in p.name}
    for p in parts:
        p.parameter.grad = torch.ones_like(p.parameter)
    groups.set_rates(optimiser, RATE, 0.0)
    optimiser.step()
    assert made.state_bytes(Trained(parts)) == sum(
        t.numel() * t.element_size() for s in optimiser.state.values() for t in s.values()
    )
    adapter = groups.of_adapter(veneer.attach(models.llama(), rank=2, to=["q_proj"]), "default")
    with pytest.raises(ConfigError) as e:
        made.build(Trained(adapter))
    assert str(e.value) == (
        "optimiser 'galore' projects gradients of full weights, but model.layers.0.self_attn.q_proj.A,"
        " model.layers.0.self_attn.q_proj.B and 2 more are low-rank factors;"
        " use method 'full' or another optimiser"
    )
    with pytest.raises(ConfigError) as e:
        optim.make("galore", rank=0, period=0, scale=0.0)
    assert str(e.value) == "rank must be >= 1, got 0\nperiod must be >= 1, got 0\nscale must be > 0, got 0"


# -- ReLoRA --------------------------------------------------------------------------------------------------


def adapted() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose adapter has moments and has learned."""
    model = veneer.attach(models.llama(), rank=3, seed=5)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(3):
        model(**models.inputs(model, seed)).logits.square().mean().backward()
        adam.step()
        adam.zero_grad()
    return model, adam


def test_a_restart_keeps_the_function_and_begins_anew():
    model, adam = adapted()
    before, start = (
        models.output(model),
        {n: d.A.detach().clone() for n, d in ((s.name, d) for s, d in changes(model, "default"))},
    )
    base = models.output(models.llama())
    relora.restart(model, "default", [adam], 1)
    torch.testing.assert_close(models.output(model), before, rtol=1e-4, atol=1e-5)
    with veneer.using(model):  # the base has it all
        torch.testing.assert_close(models.output(model), before, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(models.output(model), base)
    first = {s.name: d.A.detach().clone() for s, d in changes(model, "default")}
    assert all(
        not d.B.any() and d.A.any() and not torch.equal(d.A, start[s.name])
        for s, d in changes(model, "default")
    )
    relora.restart(model, "default", [adam], 2)
    assert all(not torch.equal(d.A, first[s.name]) for s, d in changes(model, "default"))


def test_after_a_restart_it_learns_from_the_next_step_on():
    """The released code zeroes A where B is zero already, so that neither has a gradient until the next
    restart."""
    model, adam = adapted()
    relora.restart(model, "default", [adam], 1)
    model(**models.inputs(model)).logits.square().mean().backward()
    assert all(bool(d.B.grad.any()) for _, d in changes(model, "default"))


def test_the_smallest_moments_are_forgotten_both_at_once():
    mean = torch.tensor([[0.5, -3.0, 0.1], [2.0, -0.2, 0.0]])
    state = {"step": torch.tensor(7.0), "exp_avg": mean.clone(), "exp_avg_sq": torch.ones(2, 3)}
    relora.forget(state, 0.5)
    assert state["exp_avg"].tolist() == [[0.5, -3.0, 0.0], [2.0, 0.0, 0.0]]
    assert state["exp_avg_sq"].tolist() == [[1, 1, 0], [1, 0, 0]] and state["step"] == 7
    relora.forget(state, 0.0)
    assert state["exp_avg_sq"].sum() == 3
    relora.forget(state, 1.0)
    assert not state["exp_avg"].any()
    relora.forget({}, 0.5)
    model, adam = adapted()
    relora.restart(model, "default", [adam], 1, prune=0.9)
    kept = [
        float((adam.state[p]["exp_avg"] != 0).float().mean())
        for _, d in changes(model, "default")
        for p in d.parameters()
    ]
    assert all(0.05 < share <= 0.12 for share in kept)


def test_the_rate_rises_again_after_every_restart():
    shares = [relora.jagged(step, 4, 5, 2) for step in range(15)]
    assert (
        shares[:4] == [1.0] * 4
        and shares[4:9] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])
        and shares[9:14] == shares[4:9]
    )


def test_what_cannot_be_begun_anew_is_refused():
    model = veneer.attach(models.llama().bfloat16(), init="pissa", rank=2, to=["q_proj"])
    with pytest.raises(ConfigError) as e:
        relora.check(model, "default")
    names = "model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj"
    assert str(e.value) == (
        f"ReLoRA restarts plain LoRA whose B starts at zero, unlike {names}; use method lora, init kaiming\n"
        f"ReLoRA adds small changes to the base, and {names} would round them away; keep it in float32"
    )


# -- the script ----------------------------------------------------------------------------------------------

WAYS = {
    "full": [],
    "galore": ["--rank", "4", "--period", "3"],
    "relora": ["--rank", "4", "--period", "3", "--full-steps", "3", "--rewarm", "1", "--ratio", "4"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_learns_and_goes_on_exactly_where_it_stopped(small, tmp_path, monkeypatch, way):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ["--tokens", str(12 * 2 * 16 / 1e6), "--via", way, *WAYS[way], *SMALL]
    assert pretrain.main(["--out", str(whole), *words]) == 0
    assert (
        log(whole)[-1]["known_valid_bpb"] < log(whole)[0]["known_valid_bpb"] and log(whole)[-1]["step"] == 12
    )
    step, real = 0, pretrain.loss_of

    def stops(model, windows):
        nonlocal step
        step += model.training
        if step == 10:
            raise KeyboardInterrupt
        return real(model, windows)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pretrain, "loss_of", stops)
        pretrain.main(["--out", str(parts), *words])
    assert pretrain.main(["--out", str(parts), *words]) == 0  # from the checkpoint of step 8
    a, b = (load_file(f / "model" / "model.safetensors") for f in (whole, parts))
    assert set(a) == set(b) and not any("deltas" in n for n in a) and all(torch.equal(a[n], b[n]) for n in a)


def test_relora_trains_weights_first_and_then_factors_alone(small, tmp_path, monkeypatch):
    seen = []
    real = pretrain.loss_of

    def look(model, windows):
        if model.training:
            names = [
                n for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and "embed" not in n
            ]
            seen.append((len(names), all("deltas" in n for n in names)))
        return real(model, windows)

    monkeypatch.setattr(pretrain, "loss_of", look)
    pretrain.main(
        [
            "--out",
            str(tmp_path),
            "--tokens",
            str(6 * 2 * 16 / 1e6),
            "--via",
            "relora",
            *WAYS["relora"],
            *SMALL,
        ]
    )
    assert seen == [(7, False)] * 3 + [(14, True)] * 3
    facts = json.loads((tmp_path / "model" / "training.json").read_text())
    assert facts["recipe"]["via"] == "relora" and facts["recipe"]["ratio"] == 4.0
