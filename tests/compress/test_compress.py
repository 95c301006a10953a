"""Compression of whole models: exactness, budgets, seeds, padding, memory, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support import models
from torch import nn

import veneer
from veneer.compress.lowrank import plan
from veneer.compress.lowrank.candidates import candidates
from veneer.compress.lowrank.recipe import PRESETS, recipe
from veneer.compress.lowrank.sources import Held
from veneer.compress.lowrank.survey import survey
from veneer.compress.lowrank.work import Work
from veneer.errors import ConfigError, SiteError
from veneer.ops.matrix.whitening import regularised
from veneer.sites import changed, find, site_for
from veneer.sites.factored.layers import Factored

SMALL = {"keep": 0.6, "multiple": 1}
QUICK = {**SMALL, "refine": 2}


def batches(n: int = 3, rows: int = 2, length: int = 12, seed: int = 0, padded: bool = False):
    """Batches of random tokens; padded: with random tokens behind the real ones, and no labels on them."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        ids = torch.randint(0, models.VOCABULARY, (rows, length), generator=draw)
        labels = ids.roll(-1, 1)
        if padded:
            noise = torch.randint(0, models.VOCABULARY, (rows, 5), generator=draw)
            ids = torch.cat([ids, noise], 1)
            labels = torch.cat([labels, torch.full((rows, 5), -100)], 1)
        made.append({"input_ids": ids, "labels": labels})
    return made


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, Factored)}


# -- blocks run alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.bert])
def test_blocks_that_run_one_by_one_make_the_model(build):
    model, batch = build(), batches(1)[0]
    walk = Held(model, "all-linear", ()).walk
    entered = walk.enter(batch)
    hidden = entered.hidden
    with torch.no_grad():
        for i, block in enumerate(walk.blocks):
            hidden = entered.run(i, block, hidden)
        logits = walk.leave(hidden, batch)
        torch.testing.assert_close(logits, model(input_ids=batch["input_ids"]).logits, rtol=1e-5, atol=1e-5)
    assert not any("forward" in b.__dict__ for b in walk.blocks)


# -- every method on a model -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("build", [models.llama, models.gpt2])
def test_every_method_keeps_its_share_of_the_parameters(method, build):
    model = build()
    numbers = sum(s.out * s.in_ for s in find(model))
    found = veneer.compress(
        model, method, data=batches(), **{**SMALL, **({"refine": 1} if PRESETS[method].get("refine") else {})}
    )
    step = max(s.out + s.in_ for s in find(model))
    assert found.before == numbers and found.kept <= 0.6
    allowed = (
        step * (len(found.layers) if PRESETS[method]["allocate"] == "uniform" else 1)
        if "allocate" in PRESETS[method]
        else step
    )
    assert found.before * 0.6 - found.after < allowed
    held = [m for m in model.modules() if isinstance(m, Factored)]
    extra = sum(m.bias.numel() for m in held if m.added_bias)
    assert sum(_numbers(m) for m in held) + extra + _dense(model, found) == found.after
    assert torch.isfinite(models.output(model)).all() and not model.training


def _numbers(layer: Factored) -> int:
    return sum(p.numel() for p in layer.parameters()) - (0 if layer.bias is None else layer.bias.numel())


def _dense(model: nn.Module, found) -> int:
    return sum(model.get_submodule(n).weight.numel() for n, r in found.layers.items() if r is None)


@pytest.mark.parametrize("settings", [{}, {"anchored": True}, {"refine": 2}])
@pytest.mark.parametrize("metric", ["weights", "inputs", "centred", "fisher"])
def test_full_rank_leaves_the_model_unchanged(metric, settings, monkeypatch):
    model = models.llama()
    y = models.output(model)
    monkeypatch.setattr(
        plan, "uniform", lambda sizes, recipe: {n: plan.Cut(min(s.out, s.in_)) for n, s in sizes.items()}
    )
    veneer.compress(model, "svd", keep=0.9, metric=metric, data=batches(rows=8, length=30), **settings)
    assert all(isinstance(s.module, Factored) for s in find(model))
    torch.testing.assert_close(models.output(model), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()) * 10)


def test_keep_1_leaves_every_layer_dense():
    model = models.llama()
    y = models.output(model)
    for method in ("svd-llm", "allocate"):
        found = veneer.compress(model, method, keep=1.0, data=batches())
        assert found.kept == 1 and set(found.layers.values()) == {None}
    assert torch.equal(models.output(model), y) and not changed.forms_of(model)


def test_refinement_lowers_the_held_out_error_and_the_loss_of_the_model():
    rough, fine = models.llama(), models.llama()
    data = batches(9, rows=4)
    veneer.compress(rough, "svd", data=data, **SMALL)
    found = veneer.compress(fine, "svd", data=data, refine=20, rate=3e-3, **SMALL)
    assert all(e["after"] < 0.95 * e["before"] for e in found.errors.values())
    y = models.output(models.llama())
    assert (models.output(fine) - y).norm() < (models.output(rough) - y).norm()


def test_anchored_layers_are_nearer_to_the_original_than_unanchored_ones():
    y, off = models.output(models.llama(), 5), {}
    for anchored in (False, True):
        model = models.llama()
        data = [*batches(6, rows=8), models.inputs(model, 5)]
        veneer.compress(model, "svd-llm", keep=0.5, multiple=1, data=data, anchored=anchored)
        off[anchored] = float((models.output(model, 5) - y).norm())
    assert off[True] < off[False]


# -- the survey ------------------------------------------------------------------------------------------


def surveyed(tmp_path, score: str, data, seed: int = 0):
    """The candidates of the model's layers, one variant each."""
    model = models.llama().double()
    work = Work(tmp_path / score, {})
    source = Held(model, "all-linear", ())
    survey(source, data, recipe("fisher", 0.6, score=score, centre="never"), seed, work)
    return model, {
        f"{name}.{n}": candidates(work.get(f"survey-{i:03}"), n)[0]
        for i, name in enumerate(source.walk.names)
        for n in source.names[i]
    }


def test_scores_are_the_mean_squares_of_the_loss_s_derivatives(tmp_path, monkeypatch):
    """Against autograd through W = sum of s_i b_i a_i, one sample at a time, with labels that are known."""
    data = batches(2, rows=2, length=6)

    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: torch.full(shape, 1e-9))
    model, found = surveyed(tmp_path, "gradients", data)
    name = "model.layers.1.mlp.down_proj"
    candidate, layer = found[name], model.get_submodule(name)
    A, B = candidate.A.double(), candidate.B.double()
    torch.testing.assert_close(B @ A, layer.weight, rtol=1e-5, atol=1e-5)
    sizes = torch.ones(len(A), dtype=torch.float64, requires_grad=True)
    total, tokens = torch.zeros(len(A), dtype=torch.float64), 0
    for batch in data:
        for ids in batch["input_ids"]:
            W = (B * sizes) @ A
            logits = torch.func.functional_call(model, {f"{name}.weight": W}, (ids[None],)).logits[0]
            loss = F.cross_entropy(logits, torch.zeros(len(ids), dtype=torch.int64), reduction="sum")
            (g,) = torch.autograd.grad(loss, sizes)
            total, tokens = total + g.square(), tokens + len(ids)
    expected = total / (2 * tokens)
    order = expected.argsort(descending=True)
    scores = candidate.losses[:-1] - candidate.losses[1:]
    assert torch.equal(order, torch.arange(len(order)))  # directions are sorted by what they are worth
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-9)


def test_curvature_predicts_the_loss_in_the_metric_of_gradients(tmp_path):
    data = batches(4, rows=4)
    model, found = surveyed(tmp_path, "curvature", data)
    name = "model.layers.0.self_attn.o_proj"
    inputs, slopes = [], []

    def hook(module, args, y):
        inputs.append(args[0].detach().flatten(0, -2))
        y.register_hook(lambda g: slopes.append(g.flatten(0, -2)))

    model.get_submodule(name).register_forward_hook(hook)
    draw = veneer.ops.draws.keyed(0, "labels of the survey")
    for batch in data:
        logits = model(input_ids=batch["input_ids"]).logits.flatten(0, 1)
        uniform = torch.rand(len(logits), 1, generator=draw).double()
        cumulated = logits.softmax(-1).cumsum(-1)
        labels = (cumulated < uniform * cumulated[:, -1:]).sum(-1)
        F.cross_entropy(logits, labels, reduction="sum").backward()
    X, G = torch.cat(inputs), torch.cat(slopes)
    C = regularised(X.mT @ X / len(X), 1e-6)
    R = regularised(G.mT @ G / len(G), 0.01)
    candidate = found[name]
    for rank in (4, 17):
        D = model.get_submodule(name).weight - candidate.B[:, :rank].double() @ candidate.A[:rank].double()
        torch.testing.assert_close(
            torch.trace(R @ D @ C @ D.mT) / 2, candidate.losses[rank].double(), rtol=1e-4, atol=1e-8
        )


def test_predicted_loss_is_the_divergence_of_a_slightly_cut_model(tmp_path):
    """The KL divergence from the model, measured, against the sum that the ranks were chosen by."""
    model = models.llama()
    data = batches(12, rows=8, length=24)
    base = copy.deepcopy(model)
    found = veneer.compress(model, "allocate", keep=0.9, multiple=1, data=data)
    total = tokens = 0.0
    with torch.no_grad():
        for batch in data:
            p, q = (m(input_ids=batch["input_ids"]).logits.log_softmax(-1) for m in (base, model))
            total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            tokens += batch["input_ids"].numel()
    assert 0.3 < found.predicted / (total / tokens) < 3


# -- padding, seeds, dtypes ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd-llm", "allocate", "refine"])
def test_padding_has_no_part_in_it(method):
    plain, padded = models.llama(), models.llama()
    options = {"refine": 2} if method == "refine" else {}
    a = veneer.compress(plain, method, data=batches(), **SMALL, **options)
    masked = [{"input_ids": p["input_ids"], "labels": p["labels"]} for p in _with_padding(batches())]
    b = veneer.compress(padded, method, data=masked, **SMALL, **options)
    if method != "allocate":  # labels are drawn for more positions, others by that
        assert a.layers == b.layers
        for n, W in weights_of(plain).items():
            torch.testing.assert_close(weights_of(padded)[n], W, rtol=1e-3, atol=1e-4)


def _with_padding(data):
    for batch in data:
        rows = len(batch["input_ids"])
        noise = torch.full((rows, 5), 7)
        yield {
            "input_ids": torch.cat([batch["input_ids"], noise], 1),
            "labels": torch.cat([batch["labels"], torch.full((rows, 5), -100)], 1),
        }


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    made = {}
    for name, seed in {"first": 0, "again": 0, "other": 1}.items():
        model = models.llama()
        veneer.compress(model, "auto", data=batches(), seed=seed, **QUICK)
        made[name] = models.output(model)
    assert torch.equal(made["first"], made["again"]) and not torch.equal(made["first"], made["other"])


def test_a_model_in_bfloat16_stays_in_bfloat16():
    model = models.llama().bfloat16()
    veneer.compress(model, "auto", data=batches(), **QUICK)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    y = models.output(models.llama())
    assert (models.output(model).float() - y).norm() < y.norm()


def test_layers_that_are_named_are_compressed_and_others_stay():
    model = models.llama()
    found = veneer.compress(model, "svd", keep=0.5, to=["up_proj", "down_proj"], exclude=r".*layers\.1.*")
    assert sorted(found.layers) == ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    assert sorted(changed.forms_of(model)["factored"]) == ["plain"]
    assert len(weights_of(model)) == 2


def test_weights_outside_the_blocks_stay_and_are_named():
    found = veneer.compress(models.bert(), "svd", keep=0.5)
    assert any("layers outside the blocks stay dense: bert.pooler.dense" in n for n in found.notes)
    assert found.left == ["bert.pooler.dense"]


# -- interruption ----------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupted_compression_ends_in_the_same_bytes(at, tmp_path):
    whole = models.llama(num_hidden_layers=3)
    veneer.compress(whole, "auto", data=batches(), **QUICK)
    model, lines = models.llama(num_hidden_layers=3), []

    def say(line: str) -> None:
        lines.append(line)
        if len(lines) == at + 1:
            raise Stopped

    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(Stopped):
        veneer.compress(model, "auto", data=batches(), folder=tmp_path / "work", say=say, **QUICK)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    veneer.compress(model, "auto", data=batches(), folder=tmp_path / "work", say=lines.append, **QUICK)
    assert sum(line.startswith("model.layers.0") for line in lines) == 1
    there = whole.state_dict()
    assert all(torch.equal(p, there[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_survey_that_was_interrupted_goes_on(at, tmp_path, monkeypatch):
    from veneer.compress.lowrank import survey as module

    whole = models.llama(num_hidden_layers=3)
    veneer.compress(whole, "allocate", data=batches(), **SMALL)
    real, calls = module._block, []

    def stopping(view, recipe):
        calls.append(view.i)
        if len(calls) == at:
            raise Stopped
        return real(view, recipe)

    model = models.llama(num_hidden_layers=3)
    monkeypatch.setattr(module, "_block", stopping)
    with pytest.raises(Stopped):
        veneer.compress(model, "allocate", data=batches(), folder=tmp_path, **SMALL)
    veneer.compress(model, "allocate", data=batches(), folder=tmp_path, **SMALL)
    assert calls == sorted([*range(3), 3 - at], reverse=True)
    there = whole.state_dict()
    assert all(torch.equal(p, there[n]) for n, p in model.state_dict().items())


def test_work_of_other_settings_is_not_gone_on_with(tmp_path):
    veneer.compress(models.llama(), "svd-llm", data=batches(), folder=tmp_path, **SMALL)
    with pytest.raises(ConfigError, match=r"holds the work of other settings \(keep\)"):
        veneer.compress(models.llama(), "svd-llm", data=batches(), folder=tmp_path, keep=0.7, multiple=1)


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keep": 0.0}, "keep must be above 0 and at most 1, got 0"),
        ({"keep": 1.5}, "keep must be above 0 and at most 1, got 1.5"),
        ({"keep": math.nan}, "keep must be a number, got nan"),
        ({"refine": -1}, "refine must be 0 or more, got -1"),
        ({"rate": 0.0}, "rate must be above 0, got 0"),
        ({"rank": 3}, "unknown setting 'rank'"),
        ({"metric": "inputs"}, "allocate='heap' compares layers by the loss, which metric='inputs' does not"),
        ({"metric": "wights"}, "metric"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        veneer.compress(models.llama(), "auto", data=batches(), **settings)


def test_unknown_methods_are_refused():
    with pytest.raises(ConfigError, match="unknown method 'svdllm' of compression; did you mean 'svd-llm'"):
        veneer.compress(models.llama(), "svdllm", data=batches())


def test_too_few_tokens_are_regularised_and_said():
    model = models.llama()
    found = veneer.compress(model, "svd-llm", data=batches(1, rows=1, length=6), **SMALL)
    assert any("6 calibration tokens are fewer than the widest layer's 48 inputs" in n for n in found.notes)
    assert torch.isfinite(models.output(model)).all()
    with pytest.raises(ConfigError, match="need texts"):
        veneer.compress(models.llama(), "svd-llm", **SMALL)


def test_a_keep_too_small_for_one_rank_is_refused():
    with pytest.raises(ConfigError, match="leaves no rank for model"):
        veneer.compress(models.llama(), "svd", keep=0.01)
    with pytest.raises(ConfigError, match="raise keep"):
        veneer.compress(models.llama(), "allocate", keep=0.01, data=batches())


def test_models_and_layers_that_cannot_be_compressed_are_listed():
    def refused(model: nn.Module, match: str, **given) -> None:
        with pytest.raises((SiteError, ConfigError), match=match):
            veneer.compress(model, "svd", **given)

    refused(models.conv_net(), "a ConvNet has no stack of blocks")
    adapted = veneer.attach(models.llama(), "lora", rank=2)
    refused(adapted, "compress the base first and attach afterwards; attached now: default")
    refused(veneer.quantise(models.llama()), "layers are quantised; compress first")
    small = models.llama()
    veneer.compress(small, "svd", keep=0.5)
    refused(small, "layers are factored already")
    shared = models.llama()
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    refused(shared, "2 layers share their weight with another layer: model.layers.0.mlp.up_proj")
    veneer.compress(shared, "svd", keep=0.5, exclude=["up_proj"])
    assert isinstance(shared.model.layers[1].mlp.up_proj, nn.Linear)
    hooked = models.llama()
    hooked.model.layers[0].mlp.up_proj.register_forward_hook(lambda *a: None)
    refused(hooked, "hooked or have a forward of their own")
    refused(models.llama(), "of kinds that are not compressed here: model.embed_tokens", to=["embed_tokens"])
    wild = models.llama()
    wild.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(SiteError, match="NaN or infinity in the weights"):
        veneer.compress(wild, "allocate", data=batches(), **SMALL)


def test_the_site_of_a_compressed_layer_is_adapted_and_merged():
    model = models.llama()
    veneer.compress(model, "auto", data=batches(), **QUICK)
    veneer.attach(model, "dora", rank=2)
    models.randomise(model)
    y = models.output(model)
    veneer.merge(model)
    torch.testing.assert_close(models.output(model), y, rtol=1e-3, atol=1e-3)
    name = next(iter(weights_of(model)))
    assert site_for(name, model.get_submodule(name)).kind == "linear"
