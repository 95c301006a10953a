"""The two-step low-rank product: equal to plain operations in value and gradient, keeping little, writing
only where it may."""

from __future__ import annotations

import pytest
import torch
from support.models import llama, randomise
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.adapt.attached import changes, layers
from veneer.ops.lowrank import expand, project

TOLERANCE = 1e-5


def relative(a, b):
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def plain(y, x, A, B):
    return y + x @ A.mT @ B.mT


def values(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    shapes = dict(y=(2, 5, 6), x=(2, 5, 7), A=(3, 7), B=(6, 3))
    return {
        n: torch.randn(*s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for n, s in shapes.items()
    }


@pytest.mark.parametrize("writable", [False, True])
def test_gradients_are_exact(writable):
    def function(y, x, A, B):
        return expand(y * 1, project(x, [A])[0], B, writable=writable)

    assert torch.autograd.gradcheck(function, tuple(values().values()))


def test_one_product_for_several_factors_has_the_gradients_of_each():
    v = values()
    others = [torch.randn(r, 7, dtype=torch.float64, requires_grad=True) for r in (1, 4)]

    def function(x, *factors):
        return project(x, factors)

    assert torch.autograd.gradcheck(function, (v["x"], v["A"], *others))
    hs = project(v["x"], [v["A"], *others])
    assert [h.shape[-1] for h in hs] == [3, 1, 4]
    hs[1].sum().backward()  # a part that nobody uses has no gradient, as without the others
    assert v["A"].grad is None and others[0].grad.any() and others[1].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_are_cast_once_and_take_gradients_in_their_own_dtype(dtype):
    v = values(torch.float32)
    x, y = v["x"].detach().to(dtype).requires_grad_(), v["y"].detach().to(dtype)
    out = expand(y, project(x, [v["A"]])[0], v["B"])
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert v["A"].grad.dtype == v["B"].grad.dtype == torch.float32 and x.grad.dtype == dtype
    w = {n: t.detach().double().requires_grad_() for n, t in {**v, "x": x, "y": y}.items()}
    plain(**w).square().sum().backward()
    for n, t in {"A": v["A"], "B": v["B"], "x": x}.items():
        assert relative(t.grad, w[n].grad) < 20 * torch.finfo(dtype).eps


def saved_bytes(act):
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = act()
    return sum(seen.values()), out


def test_only_the_input_and_the_narrow_product_are_kept():
    layer = nn.Sequential(nn.Linear(64, 64))
    veneer.attach(layer, "lora", rank=2)
    x = torch.randn(100, 64, requires_grad=True)
    bytes_, _ = saved_bytes(lambda: layer(x))
    factors = 4 * 2 * (64 + 64) * 2
    assert (
        bytes_ <= 4 * (100 * 64 + 64 * 64 + 64) + 4 * 100 * 2 + factors
    )  # x and W, h, and A and B with and without the scale


def test_the_layers_output_is_written_in_place_where_it_may_be():
    model = veneer.attach(nn.Sequential(nn.Linear(8, 8)), "lora", rank=2)
    addresses = []
    own = nn.Linear.forward

    def spy(self, x):
        y = own(self, x)
        addresses.append(y.data_ptr())
        return y

    nn.Linear.forward = spy
    try:
        assert model(torch.randn(3, 8)).data_ptr() == addresses[-1]
    finally:
        nn.Linear.forward = own


def test_a_view_is_not_written():
    v = values()
    whole = v["y"] * 1
    before = whole.detach().clone()
    y = expand(whole[0], project(v["x"][0], [v["A"]])[0], v["B"], writable=True)
    assert torch.equal(whole, before) and not torch.equal(y, before[0])


class Keeps(nn.Linear):
    """A layer that keeps its own output, for itself and for its backward."""

    def forward(self, x):
        self.kept = super().forward(x).exp()
        return self.kept


@pytest.mark.parametrize(
    "case", ["subclass that saves its output", "earlier hook", "view", "Conv1D", "replaced forward"]
)
def test_what_others_read_is_not_written(case):
    torch.manual_seed(0)
    seen = []
    layer = {"subclass that saves its output": Keeps, "Conv1D": lambda i, o: Conv1D(o, i)}.get(
        case, nn.Linear
    )(6, 6)
    if case == "earlier hook":
        layer.register_forward_hook(lambda m, args, y: seen.append(y))
    if case == "replaced forward":
        inner = layer.forward
        layer.forward = lambda x: seen.append(inner(x)) or seen[-1]
    model = veneer.attach(nn.Sequential(layer), "lora", rank=2)
    randomise(model)
    x = torch.randn(2, 3, 6, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    kept = seen[-1] if seen else getattr(layer, "kept", None)
    with veneer.using(model):
        base = model(x)
    if kept is not None:
        assert torch.equal(kept, base)
    assert x.grad is not None


def merged_gradients(model, batch):
    """Loss, and gradients of every A and B, from a model with the dense W + s B A in place of each weight."""
    leaves = {
        f"{s.name}.{n}": p.detach().clone().requires_grad_()
        for s, d in changes(model, "default")
        for n, p in d.named_parameters()
    }
    weights = {
        f"{s.name}.weight": s.weight().detach() + d.scaling * leaves[f"{s.name}.B"] @ leaves[f"{s.name}.A"]
        for s, d in changes(model, "default")
    }
    with veneer.using(model):
        loss = functional_call(model, weights, kwargs={**batch, "labels": batch["input_ids"]}).loss
    return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_loss_and_every_gradient_equal_the_dense_sum(checkpointing):
    model = veneer.attach(llama(), "lora", rank=3).train()
    randomise(model)
    batch = {"input_ids": torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))}
    expected, gradients = merged_gradients(model, batch)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert relative(loss, expected) <= TOLERANCE
    own = {f"{s.name}.{n}": p for s, d in changes(model, "default") for n, p in d.named_parameters()}
    assert own.keys() == gradients.keys()
    for n, p in own.items():
        assert relative(p.grad, gradients[n]) <= TOLERANCE, n


def test_a_second_derivative_is_refused_clearly():
    v = values()
    y = expand(v["y"] * 1, project(v["x"], [v["A"]])[0], v["B"])
    with pytest.raises(
        RuntimeError, match=r"derivatives of second order \(create_graph=True\) are not supported"
    ):
        torch.autograd.grad(y.square().sum(), v["A"], create_graph=True)
    (h,) = project(v["x"], [v["A"]])
    with pytest.raises(RuntimeError, match="second order"):
        torch.autograd.grad(h.sum(), v["A"], create_graph=True)


def test_functional_transforms_see_plain_operations():
    model = veneer.attach(nn.Sequential(nn.Linear(4, 4)), "lora", rank=2)
    randomise(model)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p, x):
        return functional_call(model, p, (x,)).square().sum()

    x = torch.randn(3, 4)
    one_by_one = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    whole = torch.func.grad(loss)(parameters, x)
    for n in parameters:
        torch.testing.assert_close(one_by_one[n].sum(0), whole[n])


def test_under_autocast_the_change_is_computed_in_the_layers_dtype():
    model = veneer.attach(nn.Sequential(nn.Linear(8, 8)), "lora", rank=2)
    randomise(model)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and relative(y, model(x)) < 0.02
    y.float().sum().backward()
    assert all(d["default"].A.grad is not None for d in layers(model))
