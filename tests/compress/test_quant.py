"""Weights in 8 and 4 bits: the formats against their definition, products, and whole models."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import quant as oracle
from safetensors.torch import load, save
from support import models
from support.cells import attach, check_gradient, fitted, numpy_tensors, shake
from support.table import METHODS
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import veneer
from veneer.adapt.attached import changes, n_base_parameters
from veneer.adapt.calls import check_called
from veneer.adapt.probe_inputs import default_inputs
from veneer.compress.quantise import as_plain
from veneer.errors import ConfigError, FormatError, NotMergeable, ShapeError, SiteError
from veneer.ops import quant
from veneer.ops.matrix.residual import split
from veneer.ops.quant.scales import scales as nf4_scales
from veneer.sites.quantised import formats
from veneer.sites.quantised_linear import QuantisedLinear
from veneer.tasks.text import next_token

EVERY = pytest.mark.parametrize("name", ["int8", "nf4", "spqr"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(name: str, out: int = 6, in_: int = 8, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return veneer.quantise(nn.Sequential(nn.Linear(in_, out)).to(dtype), name)


def test_the_levels_are_the_quantiles_of_the_paper():
    np.testing.assert_allclose(quant.LEVELS, oracle.nf4_levels(), atol=1e-7)
    published = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
    ]
    published += [
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
    ]
    published += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # appendix E
    np.testing.assert_allclose(quant.LEVELS, published, atol=2e-7)


def test_levels_times_a_scale_are_fixed_points():
    levels = torch.tensor(quant.LEVELS)[torch.arange(64) % 16]
    W = torch.stack([levels, 0.5 * levels, torch.zeros(64)])
    assert torch.equal(quant.rounded(W, quant.get("nf4")), W)
    W = torch.arange(-127, 128).float()[None] * torch.tensor([[1.0], [0.25], [0.0]])
    assert torch.equal(quant.rounded(W, quant.get("int8")), W)


def test_nf4_takes_the_nearest_level_at_every_scale():
    W = normal(64, 48, seed=1) * torch.logspace(-2, 1, 64)[:, None]
    format = quant.get("nf4")
    parts = format.pack(W)
    blocks = W.reshape(-1, 64).double().numpy()
    scales = nf4_scales(parts[1], parts[2]).double().numpy()
    kept = format.unpack(parts, (64, 48), torch.float32).reshape(-1, 64).numpy()
    np.testing.assert_allclose(
        kept, oracle.nearest(blocks, oracle.nf4_levels(), np.tile(scales[:, None], 64)), rtol=1e-6
    )
    np.testing.assert_allclose(scales, np.abs(blocks).max(1), rtol=0.0147)  # half a step of 2^(1/24)
    half_gap = np.diff(oracle.nf4_levels()).max() / 2
    assert (np.abs(blocks - kept) <= half_gap * scales[:, None]).all()


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 70),
    in_=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-6, 0.02, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    name=st.sampled_from(["int8", "nf4"]),
)
def test_any_shape_packs_within_its_bound_and_packs_to_the_same_again(out, in_, seed, size, dtype, name):
    W, format = size * normal(out, in_, seed=seed, dtype=dtype), quant.get(name)
    W[0] = 0
    parts = format.pack(W)
    again = format.unpack(parts, (out, in_), dtype)
    assert again.dtype == dtype and not again[0].any()
    assert all(torch.equal(a, b) for a, b in zip(format.pack(again), parts, strict=True))
    largest = W.abs().max(1, keepdim=True).values if name == "int8" else W.abs().max()
    bound = largest.double() * (
        (0.5 / 127 if name == "int8" else 0.155) + 2 * torch.finfo(torch.bfloat16).eps
    )
    assert ((again.double() - W.double()).abs() <= bound).all()


def test_outliers_spoil_their_own_block_alone():
    W = normal(256, 64, dtype=torch.float32)
    W[3] *= 100
    plain = quant.rounded(normal(256, 64), quant.get("nf4"))
    kept = quant.rounded(W, quant.get("nf4"))
    others = torch.arange(256) != 3
    spoilt = (kept - W)[others].norm() / (plain - normal(256, 64))[others].norm()
    assert spoilt < 1.03


def test_bits_a_number_are_those_of_the_paper():
    W = normal(256, 256, dtype=torch.bfloat16)
    bits = {name: 8 * sum(t.nbytes for t in quant.get(name).pack(W)) / W.numel() for name in quant.FORMATS}
    # the largest of a group in bfloat16
    assert bits["nf4"] == 4 + 8 / 64 + 16 / (64 * 256) and bits["nf4"] - 4 < 0.127
    assert bits["int8"] == 8 + 16 / 256
    # codes, scale and zero of 16 numbers, 3 outliers of 256 with their columns
    assert bits["spqr"] == 4 + (8 + 4) / 16 + 3 * (16 + 16) / 256 + 16 / (16 * 256)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 40),
    in_=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-6, 0.02, 1.0, 1e4]),
    heavy=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_spqr_keeps_outliers_and_finds_them_again(out, in_, seed, size, heavy, dtype):
    W = normal(out, in_, seed=seed, dtype=torch.float64)
    W = (size * (W**3 if heavy else W)).to(dtype)
    W[0] = 0
    format = quant.get("spqr")
    kept = quant.rounded(W, format)
    again = quant.rounded(kept, format)
    lost = float((kept.double() - W.double()).norm())
    assert float((again.double() - kept.double()).norm()) <= 0.5 * lost + 1e-30
    k = -(-in_ // 100)
    columns = W.double().abs().topk(k, dim=1).indices
    there = W.gather(1, columns).bfloat16().to(dtype)
    assert torch.equal(kept.gather(1, columns), there) and not kept[0].any()
    rest = W.double().scatter(1, columns, 0.0)
    off = (kept.double() - W.double()).scatter(1, columns, 0.0)
    width = rest.amax().clamp_min(0) - rest.amin().clamp_max(0)
    assert float(off.abs().max()) <= 0.12 * float(width) + 1e-30


def test_spqr_packs_to_almost_the_same_numbers_again():
    W = normal(128, 1024)
    kept = quant.rounded(W, quant.get("spqr"))
    again = quant.rounded(kept, quant.get("spqr"))
    assert (again - kept).norm() < 0.005 * W.norm() and (again != kept).float().mean() < 0.01


@pytest.mark.parametrize(("power", "bound"), [(1, 0.062), (3, 0.062)])
def test_spqr_loses_far_less_than_nf4(power, bound):
    W = normal(256, 1024).pow(power)
    lost = {n: float((quant.rounded(W, quant.get(n)) - W).norm() / W.norm()) for n in ("spqr", "nf4")}
    assert lost["spqr"] < bound and lost["spqr"] < 0.7 * lost["nf4"]


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_product_and_gradient_are_those_of_the_unpacked_matrix(name, dtype):
    format, W = quant.get(name), 0.1 * normal(24, 40, dtype=dtype)
    parts, x, dy = (
        format.pack(W),
        normal(3, 5, 40, seed=1, dtype=dtype),
        normal(3, 5, 24, seed=2, dtype=dtype),
    )
    x.requires_grad_(True)
    y = quant.product(x, parts, format, (24, 40))
    y.backward(dy)
    exact = format.unpack(parts, (24, 40), torch.float64)
    assert y.dtype == x.grad.dtype == dtype
    eps = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), x.detach().double() @ exact.mT, rtol=eps, atol=eps)
    torch.testing.assert_close(x.grad.double(), dy.double() @ exact, rtol=eps, atol=eps)


@EVERY
def test_one_vector_is_multiplied_as_many_are(name):
    format, W = quant.get(name), 0.1 * normal(32, 64, dtype=torch.bfloat16)
    parts, x = format.pack(W), normal(2, 1, 64, dtype=torch.bfloat16)
    many = quant.product(x, parts, format, (32, 64))
    one = quant.product(x[:1], parts, format, (32, 64))
    assert one.shape == (1, 1, 32)
    torch.testing.assert_close(one, many[:1])


@EVERY
def test_nothing_of_the_unpacked_matrix_is_kept_for_the_backward(name):
    model, x, kept = layer(name, 64, 64, torch.float32), normal(2, 64).requires_grad_(True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert {id(t) for t in kept} <= {id(p) for p in model.parameters()}
    with pytest.raises(RuntimeError, match=r"derivatives of second order"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@EVERY
def test_the_compiler_keeps_nothing_of_it_either_and_computes_the_same(name):
    torch._dynamo.reset()
    model, x, kept = layer(name, 48, 64, torch.float32), normal(3, 64).requires_grad_(True), []
    y = model(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z = compiled(x)
    (dx,) = torch.autograd.grad(z.square().sum(), x)
    assert torch.equal(z, y) and torch.equal(dx, expected)
    assert kept and not any(t.is_floating_point() and t.numel() >= 48 * 64 for t in kept)


@EVERY
@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_on_a_quantised_layer(name, method):
    model, x = layer(name), normal(2, 3, 8, dtype=torch.float64)
    row = fitted(METHODS[method], model[0])
    base, W, bias = model(x), model[0].weight, model[0].bias
    torch.testing.assert_close(base, linear(x, W, bias), rtol=1e-12, atol=1e-12)
    attach(model, row, x)
    torch.testing.assert_close(model(x), base, rtol=row.start, atol=row.start)
    shake(model)
    (_, delta) = changes(model, "default")[0]
    expected = torch.as_tensor(row.oracle(W.numpy(), numpy_tensors(delta), row.options))
    torch.testing.assert_close(model(x), linear(x, expected, bias), rtol=1e-10, atol=1e-10)
    model(x).square().sum().backward()
    assert all((p.grad is not None) == ("deltas" in n) for n, p in model.named_parameters())
    if row.exact_gradient:
        check_gradient(model, x)
    with veneer.using(model):
        assert torch.equal(model(x), base)
    plain = veneer.dequantise(copy.deepcopy(model))
    torch.testing.assert_close(plain(x), model(x), rtol=1e-10, atol=1e-10)
    veneer.merge(plain)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-10, atol=1e-10)
    veneer.detach(model)
    assert torch.equal(model(x), base) and not model[0]._forward_hooks


@EVERY
def test_layers_survive_safetensors_copies_pickles_dtypes_and_compilation(name):
    model, x = layer(name, 48, 96, torch.float32), normal(4, 96)
    y, other = model(x), layer(name, 48, 96, torch.float32)
    other[0].write(torch.zeros(48, 96))
    assert not torch.equal(other(x), y)
    other.load_state_dict(load(save(model.state_dict())))
    assert torch.equal(other(x), y)
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    W = model[0].weight
    # what is kept has bfloat16's digits
    assert torch.equal(copy.deepcopy(model).bfloat16().float()[0].weight, W)
    assert (
        copy.deepcopy(model).bfloat16()[0].dtype == torch.bfloat16 and model[0].weight.dtype == torch.float32
    )
    torch._dynamo.reset()  # other tests fill the cache of these functions
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    assert f"format={name}" in repr(model)


@EVERY
@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.bert])
def test_a_model_is_quantised_layer_by_layer_but_for_head_embeddings_and_norms(name, build):
    model, n = build(), n_base_parameters(build())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inner = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    gone = [weakref.ref(m) for m in inner]
    del inner
    assert veneer.quantise(model, name) is model
    gc.collect()
    assert formats(model) and set(formats(model).values()) == {name} and n_base_parameters(model) == n
    assert sum(r() is not None for r in gone) == len(gone) - len(formats(model))
    kept = {k for k in before if k in model.state_dict()}
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in kept)
    assert not any(k.rsplit(".", 1)[0] in formats(model) and k.endswith("weight") for k in kept)
    narrow = veneer.quantise(build().bfloat16(), name)
    same = {
        k: torch.equal(v.float(), narrow.state_dict()[k].float())
        for k, v in model.state_dict().items()
        if k not in before
    }
    assert same and all(same.values())


def test_no_more_than_one_layer_exists_twice():
    model, alive = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), []
    weights = [weakref.ref(m.weight) for m in model]
    format = quant.get("nf4")

    class Watched(type(format)):
        def pack(self, W):
            alive.append(sum(w() is not None for w in weights))
            return super().pack(W)

    quant.FORMATS["nf4"] = Watched()
    try:
        veneer.quantise(model, "nf4")
    finally:
        quant.FORMATS["nf4"] = format
    assert alive == [4, 3, 2, 1]


def test_a_module_that_is_held_twice_stays_one():
    model = nn.Module()
    model.first = model.second = nn.Linear(4, 4)
    veneer.quantise(model, "int8")
    assert model.first is model.second and isinstance(model.first, QuantisedLinear)


@EVERY
def test_a_quantised_base_trains_and_the_loss_falls(name):
    model = veneer.quantise(models.llama().bfloat16(), name)
    veneer.attach(model, "lora", rank=4)
    packed = {n: p.clone() for n, p in model.named_parameters() if "deltas" not in n}
    ids = torch.randint(0, models.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        total, n = next_token.loss(model.train(), {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
        (total / n).backward()
        adam.step()
        adam.zero_grad()
        losses.append(float(total.detach() / n))
    assert losses[-1] < 0.75 * losses[0]
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = layer("nf4", 16, 16, torch.float32), normal(3, 16).requires_grad_(True)
    (plain,) = torch.autograd.grad(model(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


def adapted(name: str, size: float) -> nn.Module:
    model = veneer.quantise(models.llama(), name)
    veneer.attach(model, "lora", rank=4)
    models.randomise(model, size=size)
    return model


def test_a_merge_back_into_the_format_says_what_survives_and_refuses_what_does_not():
    model = adapted("nf4", 0.3)
    y = models.output(model)
    verdict = veneer.merge(copy.deepcopy(model))
    # what nf4 takes of a change as large as the weights
    assert not verdict.lost and 0.05 < verdict.error < 0.5
    assert veneer.merge(adapted("int8", 0.3)).error < 0.05
    small = adapted("nf4", 0.003)
    before = models.output(small)
    way = r"; bfloat16 is finer than the base's quantised format: merge into that \(veneer\.dequantise\)"
    with pytest.raises(NotMergeable, match=r"would be lost in the merge: LOST.*\n.*" + way):
        veneer.merge(small)
    assert torch.equal(models.output(small), before) and veneer.adapters(small) == ["default"]
    assert veneer.merge(small, force=True).lost
    plain = veneer.dequantise(model, torch.float32)
    assert veneer.adapters(plain) == ["default"] and veneer.merge(plain).error < 1e-6
    torch.testing.assert_close(models.output(plain), y, rtol=1e-4, atol=1e-4)


def test_a_merge_that_only_the_outputs_refuse_gives_the_packed_weights_back():
    model = adapted("nf4", 0.3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = veneer.adapt.merge.foresee(model, {"default": 1.0})
    with pytest.raises(NotMergeable, match="of its effect on the outputs"):
        veneer.merge(model, limit=found.error + 1e-6, probe=default_inputs(model))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_dequantising_keeps_adapters_their_strengths_and_what_trains():
    model = adapted("int8", 0.1)
    veneer.attach(model, "dora", to=["q_proj"], rank=2, name="second")
    veneer.activate(model, {"default": 0.5}, "second")
    y, trained = models.output(model), [n for n, p in model.named_parameters() if p.requires_grad]
    plain = veneer.dequantise(copy.deepcopy(model))
    torch.testing.assert_close(models.output(plain), y, rtol=1e-4, atol=1e-4)
    assert veneer.active(plain) == {"default": 0.5, "second": 1.0} and not formats(plain)
    assert [n for n, p in plain.named_parameters() if p.requires_grad] == trained
    check_called(plain)
    assert isinstance(plain.model.layers[0].mlp.up_proj, nn.Linear)


@pytest.mark.parametrize("first", [True, False])
def test_a_split_is_nearer_than_the_format_alone_and_begins_as_its_paper_does(first):
    W, format, draw = normal(48, 64, dtype=torch.float64), quant.get("nf4"), torch.Generator().manual_seed(0)
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    low = (U[:, :20] * S[:20]) @ Vh[:20] if first else np.zeros((48, 64))
    kept = quant.rounded(W - torch.as_tensor(low), format).numpy()
    U, S, Vh = np.linalg.svd(W.numpy() - kept, full_matrices=False)
    expected = np.linalg.norm(W.numpy() - kept - (U[:, :20] * S[:20]) @ Vh[:20]) / np.linalg.norm(W.numpy())
    once = split(W, format, 20, iterations=1, draw=draw, whole_first=first)
    assert once.error == pytest.approx(expected, rel=1e-9)
    plain = float((quant.rounded(W, format) - W).norm() / W.norm())
    more = split(W, format, 20, iterations=5, draw=draw, whole_first=first)
    assert more.error <= once.error * (1 + 1e-9) and more.error < 0.9 * plain


@pytest.mark.parametrize("start", ["qpissa", "loftq"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_starts_that_make_up_for_quantisation_respect_the_scale(start, method):
    model, plain = models.llama(), veneer.quantise(models.llama())
    exact = models.output(model)
    stats = veneer.quantise_around(
        model, "nf4", start=start, rank=6, rank_pattern={"down_proj": 8}, to=r".*(q_proj|down_proj)"
    )
    assert (
        len(formats(model)) == 14
        and len(stats) == 4
        and stats["model.layers.0.mlp.down_proj"].residual.S.shape == (8,)
    )
    pattern = dict(to=r".*(q_proj|down_proj)", rank_pattern={"down_proj": 8}, init=start, stats=stats)
    veneer.attach(model, method, rank=6, alpha=33.0, name="a", **pattern)
    y = models.output(model)
    assert (y - exact).norm() < 0.95 * (models.output(plain) - exact).norm()
    for site, delta in changes(model, "a"):
        W = models.llama().get_submodule(site.name).weight.detach()
        after = float((site.weight() + delta.delta(site) - W).detach().norm())
        assert after < 0.9 * float((quant.rounded(W, quant.get("nf4")) - W).norm()), site.name
    with veneer.using(model):
        assert not torch.equal(models.output(model), y)  # A and B act from the first step on
    veneer.attach(model, method, rank=6, alpha=6.0, stabilised=True, name="b", **pattern)
    veneer.activate(model, "b")
    torch.testing.assert_close(models.output(model), y, rtol=1e-4, atol=1e-4)


def test_quantised_layers_are_saved_and_found_again(tmp_path):
    model = models.llama()
    veneer.quantise_around(model, "nf4", start="loftq", rank=4)
    veneer.save_quantised(model, tmp_path / "base", "org/model")
    again = veneer.load_quantised(models.llama(), tmp_path / "base")
    assert torch.equal(models.output(again), models.output(model))
    narrow = veneer.load_quantised(models.llama().bfloat16(), tmp_path / "base")
    assert torch.equal(narrow.model.layers[0].mlp.up_proj.codes, model.model.layers[0].mlp.up_proj.codes)
    with pytest.raises(
        FormatError, match=r"is of another model: .*down_proj \(32, 96\) here, \(32, 48\) there"
    ):
        veneer.load_quantised(models.llama(intermediate_size=96), tmp_path / "base")
    with pytest.raises(ConfigError, match="no layer of this model is quantised; quantise it first"):
        veneer.save_quantised(models.llama(), tmp_path / "none")
    with pytest.raises(FormatError, match=r"lacks quantised\.json, which veneer\.save_quantised writes"):
        veneer.load_quantised(models.llama(), tmp_path)
    (tmp_path / "base" / "quantised.safetensors").write_bytes(b"cut")
    with pytest.raises(
        FormatError, match=r"does not match quantised\.json; the file was changed or a save was interrupted"
    ):
        veneer.load_quantised(models.llama(), tmp_path / "base")


def test_adapters_know_the_quantised_base_that_they_were_made_on(tmp_path):
    model = adapted("nf4", 0.1)
    y = models.output(model)
    veneer.save(model, tmp_path / "a")
    again = veneer.load(veneer.quantise(models.llama(), "nf4"), tmp_path / "a")
    assert torch.equal(models.output(again), y)
    told = (
        r"another base: the adapter's is quantised \(nf4\), this model is plain; veneer\.quantise\(model,"
        r" 'nf4'\) first"
    )
    with pytest.raises(FormatError, match=told):
        veneer.load(models.llama(), tmp_path / "a")
    told = (
        r"another base: the adapter's is quantised \(nf4\), this model is quantised \(int8\); open it as it"
        r" was then"
    )
    with pytest.raises(FormatError, match=told):
        veneer.load(veneer.quantise(models.llama(), "int8"), tmp_path / "a")
    allowed = veneer.load(models.llama(), tmp_path / "a", allow="base")
    assert torch.isfinite(models.output(allowed)).all()
    other = veneer.quantise(models.llama(1), "nf4")
    with pytest.raises(FormatError, match=r"another base: \d+ of \d+ weights have other values"):
        veneer.load(other, tmp_path / "a")
    plain = models.llama()
    veneer.attach(plain, "lora", rank=2)
    models.randomise(plain)
    veneer.save(plain, tmp_path / "b")
    with pytest.raises(
        FormatError,
        match=(
            r"another base: the adapter's is plain, this model is quantised \(nf4\); open it as it was then"
        ),
    ):
        veneer.load(veneer.quantise(models.llama(), "nf4"), tmp_path / "b")


def test_a_model_is_plain_for_a_moment_and_quantised_after_it():
    model = adapted("nf4", 0.1)
    y = models.output(model)
    with as_plain(model):
        assert (
            type(model.model.layers[0].mlp.up_proj) is nn.Linear
            and model.model.layers[0].mlp.up_proj.weight.is_meta
        )
    assert torch.equal(models.output(model), y)


def test_what_cannot_be_is_said_before_anything_is_changed():
    def refused(error, match, call, packed=0):
        model = models.llama()
        before = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(error, match=match):
            call(model)
        assert len(formats(model)) == packed  # by the call itself, before what is refused
        if not packed:
            now = {n: p for n, p in model.named_parameters() if "deltas" not in n}
            assert now.keys() == before.keys() and all(
                p.isnan().any() or torch.equal(p, before[n]) for n, p in now.items()
            )

    refused(
        ConfigError,
        "unknown format 'nf5' of quantised weights; did you mean 'nf4'",
        lambda m: veneer.quantise(m, "nf5"),
    )
    refused(ConfigError, "14 layers are quantised already", lambda m: veneer.quantise(veneer.quantise(m)), 14)
    first = "quantise the base before adapters are attached; attached: default"
    refused(ConfigError, first, lambda m: veneer.quantise(veneer.attach(m)))
    refused(
        SiteError, "exclude='nothing' leaves out no layer", lambda m: veneer.quantise(m, exclude=["nothing"])
    )
    refused(
        ConfigError,
        "a quantised base cannot be trained: .* train an adapter",
        lambda m: veneer.train_only(veneer.quantise(m), "base"),
        14,
    )
    around = veneer.quantise_around
    refused(
        ConfigError,
        "unknown start 'lofq' of a quantised base; did you mean 'loftq'",
        lambda m: around(m, start="lofq"),
    )
    refused(ConfigError, "iterations must be >= 1, got 0", lambda m: around(m, iterations=0))
    refused(ShapeError, "rank 33 > min", lambda m: around(m, rank=33))
    refused(
        ConfigError,
        "start 'qpissa': layers must be quantised, got lm_head; exclude them",
        lambda m: around(m, to=["lm_head"]),
    )
    refused(
        ConfigError, "quantise for it first", lambda m: veneer.attach(veneer.quantise(m), init="loftq"), 14
    )
    wrong = "the base was quantised for rank 4 on 32 x 32, the rank here is 3; use that rank"
    refused(ConfigError, wrong, lambda m: veneer.attach(m, init="loftq", rank=3, stats=around(m, rank=4)), 14)

    def broken(m):
        m.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
        veneer.quantise(m)

    refused(SiteError, r"finite, got NaN or infinity at model\.layers\.0\.mlp\.up_proj", broken)

    def hooked(m):
        m.model.layers[1].mlp.up_proj.register_forward_hook(lambda *given: None)
        veneer.quantise(m)

    refused(SiteError, r"hooks or a custom forward would be lost at model\.layers\.1\.mlp\.up_proj", hooked)
