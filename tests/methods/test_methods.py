"""Every property on every cell of METHODS x SITES, in float64."""

from __future__ import annotations

import copy
import inspect
import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cells import attach, check_gradient, fitted, numpy_tensors, shake
from support.table import METHODS, SITES, Method, Place
from torch import nn

import veneer
import veneer.methods
from veneer.adapt.attached import changes
from veneer.adapt.merge import merge
from veneer.errors import ConfigError, ShapeError
from veneer.sites import site_for
from veneer.sites.factored.layers import Factored, plain_linear

CELLS = list(itertools.product(METHODS, SITES))
cells = pytest.mark.parametrize(("method", "site"), CELLS)


def made(method: str | Method, site: str, seed: int = 0):
    """The plain layer, the same layer adapted, and an input."""
    torch.manual_seed(seed)
    place = SITES[site]
    base = nn.Sequential(place.layer().double())
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.1 * torch.randn_like(p))  # no zeros in biases, no zero row for the padding token
    row = METHODS[method] if isinstance(method, str) else method
    model = copy.deepcopy(base)
    rank = min(row.options.get("rank", 99), *weight_of(base).shape)
    options = {**row.options, **({"rank": rank} if "rank" in row.options else {})}
    x = place.x()
    row = fitted(row._replace(options=options), base[0])
    attach(model, row, x)
    return base, model, x, row


def weight_of(model):
    return site_for("0", model[0]).weight()


def layer_with(base, W):
    """The plain layer with another matrix, put there without veneer's writer."""
    layer = copy.deepcopy(base)
    if isinstance(layer[0], Factored):
        layer[0] = plain_linear(torch.zeros(W.shape, dtype=torch.float64), layer[0].bias)
    weight = layer[0].weight
    W = torch.as_tensor(W)
    transposed = type(layer[0]).__name__ in ("Conv1D", "Embedding")
    with torch.no_grad():
        weight.copy_((W.T if transposed else W).reshape(weight.shape))
    return layer


@cells
def test_starts_as_the_base(method, site):
    base, model, x, row = made(method, site)
    torch.testing.assert_close(model(x), base(x), rtol=row.start, atol=row.start)


@cells
def test_equals_the_closed_form(method, site):
    base, model, x, row = made(method, site)
    shake(model)
    (_, delta), W = changes(model, "default")[0], weight_of(base).detach().numpy()
    expected = layer_with(base, row.oracle(W, numpy_tensors(delta), row.options))
    torch.testing.assert_close(model(x), expected(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_closed_form_with_more_outputs_than_inputs(method, monkeypatch):
    monkeypatch.setitem(SITES, "wide", Place(lambda: nn.Linear(6, 10), lambda: torch.randn(2, 6).double()))
    test_equals_the_closed_form(method, "wide")


@cells
def test_forward_equals_merged(method, site):
    _, model, x, _ = made(method, site)
    shake(model)
    y = model(x)
    verdict = merge(model)
    assert verdict.error < 1e-12
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)


@cells
def test_off_is_the_base_bit_for_bit_and_detach_leaves_no_trace(method, site):
    base, model, x, _ = made(method, site)
    shake(model)
    with veneer.using(model):
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))
    veneer.detach(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    assert not model[0]._forward_hooks and not model._forward_hooks and torch.equal(model(x), base(x))


@cells
def test_strength_is_a_dial(method, site):
    base, model, x, row = made(method, site)
    shake(model)
    full, (_, delta), W = model(x), changes(model, "default")[0], weight_of(base).detach().numpy()
    for t in (0.0, 0.25, 2.0, -1.0):
        if row.dial is None:
            expected = base(x) + t * (full - base(x))
        else:
            tensors = row.dial(numpy_tensors(delta), t)
            expected = layer_with(base, row.oracle(W, tensors, row.options))(x)
        with veneer.using(model, {"default": t}):
            torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
            y = model(x)
        merged = copy.deepcopy(model)
        merge(merged, {"default": t})
        torch.testing.assert_close(merged(x), y, rtol=1e-10, atol=1e-10)


@cells
def test_exactly_the_changes_take_gradients(method, site):
    _, model, x, row = made(method, site)
    shake(model)
    if getattr(model[0], "padding_idx", None) == 0:
        x = x.clamp(min=1)  # the padding row takes no gradient, whatever the formula says
    model(x).square().sum().backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == ("deltas" in n), n
    if row.exact_gradient:
        check_gradient(model, x)


@cells
def test_copies_are_independent_and_pickles_are_whole(method, site):
    _, model, x, _ = made(method, site)
    shake(model)
    y = model(x)
    twin = copy.deepcopy(model)
    shake(twin)
    assert torch.equal(model(x), y) and not torch.equal(twin(x), y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), y)
    veneer.detach(again)
    assert not torch.equal(again(x), y)


@cells
def test_bfloat16_is_nearly_as_close_as_the_plain_layer(method, site):
    """In bf16 the adapted layer errs at most twice as much as a plain layer with the same matrix."""
    base, model, x, row = made(method, site)
    shake(model, size=0.05)
    exact = model(x)
    delta = changes(model, "default")[0][1]
    plain = layer_with(
        base, row.oracle(weight_of(base).detach().numpy(), numpy_tensors(delta), row.options)
    ).bfloat16()
    adapted = copy.deepcopy(base).bfloat16()
    attach(adapted, row, x.bfloat16() if x.is_floating_point() else x)
    changes(adapted, "default")[0][1].load_state_dict(delta.state_dict())
    half = x.bfloat16() if x.is_floating_point() else x
    y = adapted(half)
    assert y.dtype == torch.bfloat16

    def error(other, exact=exact):
        return float((other.double() - exact).detach().norm() / exact.detach().norm())

    allowed = error(plain(half))
    if isinstance(base[0], Factored):  # which rounds between its products, adapted or not
        allowed = max(allowed, error(copy.deepcopy(base).bfloat16()(half), base(x)))
    assert error(y) <= 2 * allowed + 2**-9  # one rounding of the output is free


@pytest.mark.parametrize("site", SITES)
def test_stacking_is_a_sum_in_any_order(site):
    outputs = []
    for order in itertools.permutations(["lora", "dora", "pissa"]):
        torch.manual_seed(0)
        model, x = nn.Sequential(SITES[site].layer().double()), SITES[site].x()
        for n in order:
            row = METHODS[n]
            veneer.attach(
                model, row.name, to=["0"], name=n, **{**row.options, "rank": min(2, *weight_of(model).shape)}
            )
            torch.manual_seed(len(n))
            shake(model, n)
        outputs.append(model(x))
        merge(model)
        torch.testing.assert_close(model(x), outputs[-1], rtol=1e-10, atol=1e-10)
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    in_=st.integers(1, 9),
    out=st.integers(1, 9),
    data=st.data(),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    batch=st.lists(st.integers(1, 3), max_size=3),
    method=st.sampled_from(
        [
            ("lora", {}),
            ("lora", {"stabilised": True}),
            ("lora", {"init": "pissa"}),
            ("lora", {"init": "olora"}),
            ("dora", {}),
        ]
    ),
)
def test_any_shape_rank_and_dtype(in_, out, data, seed, dtype, batch, method):
    torch.manual_seed(seed % 1000)
    rank = data.draw(st.integers(1, min(in_, out)))
    base = nn.Sequential(nn.Linear(in_, out).to(dtype))
    model, x = copy.deepcopy(base), torch.randn(*batch, in_, dtype=dtype)
    veneer.attach(model, method[0], rank=rank, seed=seed, **method[1])
    eps = 8 * in_ * torch.finfo(dtype).eps
    torch.testing.assert_close(model(x), base(x), rtol=eps, atol=eps)
    shake(model)
    y = model(x)
    exact = copy.deepcopy(model).double()
    assert y.shape == (*batch, out) and y.dtype == dtype
    reference = exact(x.double())
    parameters = [p.detach() for _, d in changes(model, "default") for p in d.parameters()]
    size = float(reference.detach().abs().max()) + in_ * sum(float(p.abs().max()) ** 2 for p in parameters)
    torch.testing.assert_close(y.double(), reference, rtol=eps, atol=eps * max(1.0, size))
    assert all(p.dtype == torch.promote_types(dtype, torch.float32) for p in parameters)


@pytest.mark.parametrize("method", METHODS)
def test_one_compiled_graph(method):
    torch._dynamo.reset()  # each method compiles these functions anew; the cache holds few versions
    _, model, x, _ = made(method, "linear")
    shake(model)
    y = model(x)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y, rtol=1e-10, atol=1e-10)
    with veneer.using(model):
        assert not torch.allclose(compiled(x), y)


def test_a_row_of_zeros_learns_under_dora_as_under_lora():
    """Its norm is zero, which nothing is divided by, not even for a gradient that is then left out."""
    gradients = []
    for name in ("lora", "dora"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64))
        with torch.no_grad():
            model[0].weight[2] = 0
        veneer.attach(model, name, rank=2)
        model(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
        gradients.append({n.rsplit(".", 1)[-1]: p.grad for n, p in model.named_parameters() if "deltas" in n})
    plain, dora = gradients
    assert bool(plain["B"][2].any()) and all(bool(g.isfinite().all()) for g in dora.values())
    torch.testing.assert_close(dora["B"][2], plain["B"][2])


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("site", ["linear", "conv2d", "conv2d grouped"])
def test_dropout_thins_the_change_alone_and_only_in_training(method, site):
    row = METHODS[method]
    base, model, x, _ = made(row._replace(options={**row.options, "dropout": 0.5}), site)
    shake(model)
    model.eval()
    still = model(x)
    assert torch.equal(model(x), still)
    model.train()
    torch.manual_seed(0)
    draws = torch.stack([model(x).detach() for _ in range(3000)])
    assert not torch.equal(draws[0], draws[1])
    spread = draws.std(0) / 3000**0.5
    assert ((draws.mean(0) - still).abs() <= 6 * spread + 1e-9).all()  # unbiased: six standard errors
    with veneer.using(model):
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("name", veneer.methods.available())
def test_every_method_is_asked_for_its_layers_in_the_same_way(name):
    find = inspect.signature(veneer.methods.get(name).find)
    assert [(p.name, p.default) for p in find.parameters.values()] == [
        ("model", inspect.Parameter.empty),
        ("to", inspect.Parameter.empty),
        ("exclude", ()),
        ("untie", False),
        ("options", None),
    ]


def options_with(name):
    return [m for m in veneer.methods.available() if name in veneer.methods.options_of(veneer.methods.get(m))]


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 2.0])
@pytest.mark.parametrize("name", options_with("dropout"))
def test_dropout_outside_its_range_is_refused(name, wrong):
    with pytest.raises(ConfigError, match=rf"dropout must be in \[0, 1\), got {wrong}"):
        veneer.attach(nn.Sequential(nn.Linear(64, 64)), name, dropout=wrong, to=["0"])


@pytest.mark.parametrize("wrong", [0, -1])
@pytest.mark.parametrize("name", options_with("rank"))
def test_ranks_below_one_are_refused(name, wrong):
    with pytest.raises((ConfigError, ShapeError), match=rf"rank .*{wrong}"):
        veneer.attach(nn.Sequential(nn.Linear(64, 64)), name, rank=wrong, to=["0"])


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", options_with("alpha"))
def test_scales_that_are_no_positive_number_are_refused(name, wrong):
    with pytest.raises(ConfigError, match=r"alpha must be a (number above 0|finite number)"):
        veneer.attach(nn.Sequential(nn.Linear(64, 64)), name, alpha=wrong, to=["0"])


@pytest.mark.parametrize("option", ["placement", "activation", "basis", "init"])
def test_unknown_choices_are_refused_before_anything_is_built(option):
    for name in options_with(option):
        site = site_for("0", nn.Linear(8, 8))
        with pytest.raises(ConfigError, match=rf"{option}.*'nowhere'"):
            veneer.methods.build(veneer.methods.get(name), site, {option: "nowhere", "rank": 2})
