"""Layers take the kernel for base and adapters only where it computes all that acts at them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer.adapt.banks import one_pass
from veneer.adapt.banks.one_pass import one_pass_bank
from veneer.adapt.banks.rows import Form
from veneer.methods import Factors
from veneer.sites import find

MARK = 1000.0


class Own(nn.Linear):
    """Another class than Linear, whose forward may do anything."""


@pytest.fixture
def kernel(monkeypatch):
    """Stands for the kernel: notes its calls and returns the base's output plus MARK."""
    calls = []

    def product(x, W, bias, stacks, plan):
        calls.append((tuple(x.shape), {n: (A.shape[1], B.shape[1]) for n, (A, B) in stacks.items()}))
        return x @ W.T + (0 if bias is None else bias) + MARK

    monkeypatch.setattr(one_pass.fused, "product", product)
    monkeypatch.setattr(one_pass.fused, "fits", lambda W, rank: rank != 4)
    return calls


def served(*adapters, kind=nn.Linear):
    """A model of two layers and a bank for 2 to 4 rows an adapter.

    adapters: layer, rank, and "g" for a gain.
    """
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, 5), kind(5, 4)).double()
    sites = {site.name: site for site in find(model, "all-linear")}
    bank, placed = one_pass_bank(model, (2, 4)), []
    for name, rank, *gain in adapters:
        s = sites[name]
        A, B = torch.randn(rank, s.in_).double(), torch.randn(s.out, rank).double()
        form = Form(Factors(A, B, torch.full((s.out,), 2.0).double() if gain else None))
        placed.append(bank.put({name: (s, form)})[0])
    return model, bank, placed


def used(model, n, kernel, *, shape=None):
    """Runs the first layer, and tells if the kernel computed it."""
    kernel.clear()
    x = torch.randn(*(shape or (n,)), 6).double()
    with torch.no_grad():
        y = model[0](x)
    assert y.shape == (*x.shape[:-1], 5) and len(kernel) <= 1
    if kernel:
        torch.testing.assert_close(y, nn.functional.linear(x, model[0].weight, model[0].bias) + MARK)
    return bool(kernel)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [([2], True), ([4], True), ([1], False), ([5], False), ([2, 3], True), ([2, 5], False), ([1, 4], False)],
)
def test_the_numbers_of_rows_are_inside_the_measured_ones(rows, wanted, kernel):
    model, bank, placed = served(("0", 1), ("0", 1))
    bank.use([(((placed[i], 1.0),), n) for i, n in enumerate(rows)])
    assert used(model, sum(rows), kernel) is wanted
    assert not wanted or kernel == [((sum(rows), 6), {0: (1, 1)})]


def test_any_shape_of_rows_and_rows_of_the_base(kernel):
    model, bank, placed = served(("0", 1))
    bank.use([(((placed[0], 1.0),), 3), ((), 3)])
    for shape in ((6,), (1, 6), (2, 3)):
        assert used(model, 6, kernel, shape=shape)


def test_several_stacks_must_all_fit(kernel):
    model, bank, placed = served(("0", 1), ("0", 2), ("0", 3))
    bank.use([(((placed[0], 1.0),), 2), (((placed[1], 1.0),), 2)])
    assert used(model, 4, kernel) and kernel[0][1] == {0: (1, 1), 1: (2, 2)}
    model, bank, placed = served(("0", 1), ("0", 4))
    bank.use([(((placed[0], 1.0),), 2), (((placed[1], 1.0),), 2)])
    assert not used(model, 4, kernel)
    bank.use([(((placed[0], 1.0),), 2)])
    assert used(model, 2, kernel)


def test_gains_sums_and_layers_without_a_change_go_the_usual_way(kernel):
    model, bank, placed = served(("0", 1), ("0", 1, "g"), ("1", 8))
    low, gain, other = ((p, 1.0) for p in placed)
    for terms, wanted in (((low,), True), ((gain,), False), ((low, gain), False), ((other,), False)):
        bank.use([(terms, 3)])
        assert used(model, 3, kernel) is wanted
    bank.use([((), 3)])
    assert not used(model, 3, kernel)


def test_training_and_inputs_of_another_dtype_go_the_usual_way(kernel):
    model, bank, placed = served(("0", 1))
    bank.use([(((placed[0], 1.0),), 3)])
    model[0](torch.randn(3, 6).double())
    assert not kernel
    layer, x = bank.layers["0"], torch.randn(3, 6)
    with torch.no_grad():
        assert layer.turned(x, layer.site) is None
        assert layer.turned(x.double().to("meta"), layer.site) is None
        assert layer.turned(x.double(), layer.site).shape == (0, 6)


HOOKS = {
    "none": lambda layer: None,
    "behind": lambda layer: layer.register_forward_hook(lambda *event: None),
    "in front": lambda layer: layer.register_forward_pre_hook(lambda *event: None),
    "two": lambda layer: (
        layer.register_forward_hook(lambda *event: None),
        layer.register_forward_pre_hook(lambda *event: None),
    ),
}


@pytest.mark.parametrize("which", HOOKS)
def test_a_hook_of_others_would_see_no_rows(which, kernel):
    model, bank, placed = served(("0", 1))
    bank.use([(((placed[0], 1.0),), 3)])
    HOOKS[which](model[0])
    assert used(model, 3, kernel) is (which == "none")


@pytest.mark.parametrize("which", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_of_all_modules_would_see_no_rows(which, kernel):
    model, bank, placed = served(("0", 1))
    bank.use([(((placed[0], 1.0),), 3)])
    handle = getattr(nn.modules.module, which)(lambda *event: None)
    try:
        assert not used(model, 3, kernel)
    finally:
        handle.remove()
    assert used(model, 3, kernel)


def test_classes_and_forwards_of_others_go_the_usual_way(kernel):
    model, bank, placed = served(("0", 1), kind=Own)
    bank.use([(((placed[0], 1.0),), 3)])
    assert not used(model, 3, kernel)
    model, bank, placed = served(("0", 1))
    bank.use([(((placed[0], 1.0),), 3)])
    model[0].forward = model[0].forward
    assert not used(model, 3, kernel)
