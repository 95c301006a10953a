"""GoRA, KeepLoRA, EVA and CorDA: starts from the gradient and from layers' inputs, against the papers."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
from oracles import starts as oracle
from support import models, tiny
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.errors import ConfigError
from veneer.methods import Stats, inits
from veneer.ops.draws import keyed
from veneer.ops.matrix.sketch import Svd
from veneer.runs.fit import fit
from veneer.train.run import Run

R = 2


def matrices(out=6, in_=9):
    draw = np.random.default_rng(1)
    return draw.standard_normal((out, in_)), draw.standard_normal((out, in_))


def exact(G):
    U, S, Vh = np.linalg.svd(G, full_matrices=False)
    return Stats(
        Svd(
            *(
                torch.from_numpy(t[..., : 2 * R, :] if i == 2 else t[..., : 2 * R])
                for i, t in enumerate((U, S, Vh))
            )
        )
    )


def started(init, W, stats, s=1.5, **options):
    given = inits.Start(torch.from_numpy(W), R, s, keyed(0, "x"), stats=stats)
    return (t.numpy() for t in inits.get(init).start(given, **options))


def low_rank(G, k):
    U, S, V = np.linalg.svd(G, full_matrices=False)
    return (U[:, :k] * S[:k]) @ V[:k]


def test_gora_steps_along_the_gradient_seen_through_a():
    W, G = matrices()
    A, B = started("gora", W, exact(G), gamma=0.1)
    np.testing.assert_allclose(B, oracle.gora(low_rank(G, 2 * R), A, 1.5, 0.1), rtol=1e-10)
    assert np.sum(B @ A * G) < 0


def test_keeplora_reads_nothing_that_w_mostly_reads():
    W, G = matrices()
    A, B = started("keeplora", W, exact(G), protected=0.4)
    M, expected = oracle.keeplora(W, low_rank(G, 2 * R), R, 0.4)
    np.testing.assert_allclose(np.abs(A @ expected.T), np.eye(R), atol=1e-10)
    assert np.abs(A @ M).max() < 1e-15 and not B.any()
    np.testing.assert_allclose(A @ A.T, np.eye(R), atol=1e-12)


def test_keeplora_keeps_its_promise_after_any_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 6, bias=False).double(), nn.Tanh(), nn.Linear(6, 4).double())
    x = torch.randn(20, 9).double()

    def loss(m, x):
        return m(x).square().sum()

    stats = veneer.calibrate(model, [x], rank=R, loss=loss, to=["0"])
    W = model[0].weight.detach().clone()
    veneer.attach(model, "lorafa", init="keeplora", rank=R, to=["0"], stats=stats)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(10):
        adam.zero_grad()
        loss(model, x).backward()
        adam.step()
    M, _ = oracle.keeplora(W.numpy(), np.ones((6, 9)), R)
    ((site, delta),) = changes(model, "default")
    D = delta.delta(site).detach().numpy()
    assert np.linalg.norm(D) > 0.1 and np.abs(D @ M).max() < 1e-12


def seen(model, names, batches):
    """The inputs (n, in) of the layers, from hooks."""
    found = {n: [] for n in names}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: found[n].append(a[0].detach()))
        for n in names
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {n: torch.cat([x.flatten(0, -2) for x in xs]).double().numpy() for n, xs in found.items()}


TO = ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.mlp.down_proj"]


def looked_at():
    model = models.llama().double()
    batches = [models.inputs(model, seed) for seed in range(3)]
    stats = veneer.calibrate(
        model, batches, rank=R, to=TO, loss=lambda m, b: m(**b).logits.square().sum(), inputs=True
    )
    names = list(stats)
    return model, stats, seen(model, names, batches)


def test_eva_reads_the_main_directions_of_the_inputs_and_is_plain_lora(tmp_path):
    model, stats, X = looked_at()
    veneer.attach(model, "lora", init="eva", rank=R, to=TO, stats=stats)
    for site, delta in changes(model, "default"):
        A, expected = delta.A.detach().numpy(), oracle.eva(X[site.name], R)
        np.testing.assert_allclose(np.abs(A @ expected.T), np.eye(R), atol=1e-8)
        assert not delta.B.any()
    models.randomise(model)
    model.float()
    veneer.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    torch.testing.assert_close(models.output(theirs), models.output(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_corda_takes_the_part_that_the_inputs_use_most_or_least(mode):
    model, stats, X = looked_at()
    base = models.output(model)
    veneer.attach(
        model, "lora", init="corda", init_options={"mode": mode}, rank=R, alpha=3.0, to=TO, stats=stats
    )
    torch.testing.assert_close(models.output(model), base)
    for site, delta in changes(model, "default"):
        W = site.weight().detach().numpy()
        expected = oracle.corda(W, X[site.name], R, 1.5, least=mode == "knowledge")
        found = 1.5 * (delta.B @ delta.A).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-7 * np.abs(expected).max())


def test_layers_that_read_one_tensor_share_its_moments():
    from veneer.methods.base.moments import Moments
    from veneer.sites import site_for

    x, moments = torch.randn(5, 4), Moments()
    first, second, other = (site_for(n, nn.Linear(4, 3)) for n in "abc")
    for _ in range(2):
        for site in (first, second):
            moments.see(x, site)
        moments.see(x.clone(), other)
    assert moments.sums["a"] is moments.sums["b"] and moments.sums["c"] is not moments.sums["a"]
    torch.testing.assert_close(moments.sums["a"], 2 * (x.mT @ x).double())
    torch.testing.assert_close(moments.sums["c"], moments.sums["a"])


def test_convolutions_and_embeddings_have_moments_and_grouped_ones_have_not():
    from veneer.methods.base.moments import Moments
    from veneer.sites import site_for

    conv, embedding = nn.Conv2d(2, 5, 3, padding=1), nn.Embedding(7, 3)
    image, ids, moments = torch.randn(2, 2, 6, 6), torch.tensor([[1, 1, 4]]), Moments()
    moments.see(image, site_for("conv", conv))
    moments.see(ids, site_for("embedding", embedding))
    moments.see(image, site_for("grouped", nn.Conv2d(2, 4, 3, groups=2)))
    rows = nn.functional.unfold(image, 3, padding=1).mT.flatten(0, 1).double()
    torch.testing.assert_close(moments.sums["conv"], rows.mT @ rows)
    assert moments.sums["embedding"].diagonal().tolist() == [0, 2, 0, 0, 1, 0, 0]
    assert "grouped" not in moments.sums


def test_inputs_that_are_missing_or_of_another_rank_are_refused():
    model, stats, _ = looked_at()
    with pytest.raises(
        ConfigError, match=r"starts from the layer's inputs, which are missing; calibrate first"
    ):
        veneer.attach(model, "lora", init="eva", rank=R, to=TO)
    bare = veneer.calibrate(
        model, [models.inputs(model)], rank=R, to=TO, loss=lambda m, b: m(**b).logits.sum()
    )
    assert all(s.inputs is None and s.oriented is None for s in bare.values())  # they take memory
    with pytest.raises(
        ConfigError, match=r"starts from the layer's inputs, which are missing; calibrate first"
    ):
        veneer.attach(model, "lora", init="corda", rank=R, to=TO, stats=bare)
    with pytest.raises(ConfigError, match="calibrated for rank 2, the rank here is 3; calibrate with rank=3"):
        veneer.attach(model, "lora", init="corda", rank=3, to=TO, stats=stats)


@pytest.mark.parametrize(
    ("init", "options", "text"),
    [
        ("gora", {"gamma": 0.0}, "gamma must be a number above 0, got 0.0"),
        ("keeplora", {"protected": 1.0}, "protected must be above 0 and below 1, got 1.0"),
        ("corda", {"mode": "knowlege"}, "unknown mode 'knowlege'; did you mean 'knowledge'?"),
    ],
)
def test_impossible_options_are_refused(init, options, text):
    W, G = matrices()
    with pytest.raises(ConfigError, match=text):
        started(init, W, exact(G)._replace(oriented=(exact(G).gradient,) * 2), **options)


@pytest.mark.parametrize(
    ("method", "init"), [("lora", "eva"), ("lora", "corda"), ("lora", "gora"), ("lorafa", "keeplora")]
)
def test_a_run_calibrates_by_itself(method, init, tmp_path):
    given = tiny.settings(
        tmp_path,
        out=str(tmp_path / "run"),
        steps=2,
        eval_every=2,
        method=method,
        options={"rank": 2, "init": init},
    )
    result = fit(Run.from_dict(given), progress=False)
    assert any(f"init '{init}' used statistics of" in note for note in result.metrics["notes"])
    record = json.loads((tmp_path / "run" / "adapter" / "veneer.json").read_text())
    assert record["options"]["init"] == init
