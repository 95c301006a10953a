"""Under activation checkpointing the backward pass sees the forward pass's adapters, or raises."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support.models import llama, randomise
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import veneer
from veneer.errors import SiteError


class Blocks(nn.Module):
    """Two blocks, each recomputed in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6), reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.second(self.first(x).tanh()).tanh()
        inner = lambda h: self.second(self.first(h).tanh()).tanh()  # noqa: E731
        return checkpoint(inner, x, use_reentrant=self.reentrant)


def adapted(reentrant, method="lora", **options):
    torch.manual_seed(0)
    model = Blocks(reentrant).double().train()
    for name in ("a", "b"):
        veneer.attach(model, method, name=name, **options)
        randomise(model, name, seed=len(name), size=0.3)
    veneer.train_only(model, "a", "b")
    return model


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def x():
    return torch.linspace(-1, 1, 24).view(4, 6).double().requires_grad_()


KINDS = [False, True]
ERRORS = (SiteError, CheckpointError)  # PyTorch compares the shapes of what is recomputed itself
METHODS = {"lora": {"rank": 2}, "dora": {"rank": 2}, "ia3": {"to": ["first"]}, "full": {}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_within_one_state_gradients_are_those_without_checkpointing(method, reentrant, training):
    plain, model = (adapted(r, method, **METHODS[method]).train(training) for r in (None, reentrant))
    for m in (plain, model):
        for names in (["a"], [{"a": 0.5, "b": -1.0}], []):
            with veneer.using(m, *names):
                y = m(x()).square().sum()
                if y.requires_grad:
                    y.backward()
    for n, g in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[n], g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", KINDS)
@pytest.mark.parametrize("names", [["a"], [{"a": 0.5, "b": 1.0}], [{"a": 0.5, "b": -1.0}]])
def test_a_backward_pass_under_other_strengths_is_an_error(method, reentrant, names):
    model = adapted(reentrant, method, **METHODS[method])
    veneer.activate(model, {"a": 0.25, "b": -1.0})
    with veneer.using(model, *names):
        y = model(x()).square().sum()
    with pytest.raises(
        ERRORS, match=r"computed again in the backward pass|Recomputed values|different number"
    ):
        y.backward()


class Recurrent(nn.Module):
    """A layer with two adapted matrices, which returns a tuple, recomputed in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.gru, self.reentrant = nn.GRU(6, 6), reentrant

    def forward(self, x):
        return checkpoint(lambda h: self.gru(h)[0], x, use_reentrant=self.reentrant)


@pytest.mark.parametrize(("reentrant", "training"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("changed", ["a", "b", None])
def test_adapters_of_any_matrix_of_a_module_are_watched(changed, reentrant, training):
    """Also those that hang on its second matrix alone."""
    torch.manual_seed(0)
    model = Recurrent(reentrant).double()
    for name, matrix in (("a", "weight_ih_l0"), ("b", "weight_hh_l0")):
        veneer.attach(model, "lora", name=name, to=[matrix], rank=2)
        randomise(model, name, size=0.3)
    veneer.train_only(model, "a", "b")
    model.train(training)
    veneer.activate(model, "a", "b")
    y = model(x()).square().sum()
    veneer.activate(model, *({n: 0.5 if n == changed else 1.0} for n in ("a", "b")))
    if changed is None:
        y.backward()
    else:
        with pytest.raises(SiteError, match=r"gru\.weight_.*is computed again in the backward pass"):
            y.backward()


class Last(nn.Module):
    """Recomputes a single layer, which checkpointing leaves as soon as it has the tensors that it needs."""

    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", KINDS)
@pytest.mark.parametrize(
    ("method", "layer"), [("lora", nn.Linear), ("hra", nn.Linear), ("full", nn.LayerNorm)]
)
def test_a_layer_at_the_end_of_what_is_recomputed_is_watched(method, layer, reentrant):
    model = Last(layer(*([6] if layer is nn.LayerNorm else [6, 6])), reentrant).double().train()
    veneer.attach(model, method, **({} if method == "full" else {"rank": 2}))
    randomise(model, size=0.3)
    with veneer.using(model, {"default": 0.5}):
        y = model(x()).square().sum()
    with pytest.raises(SiteError, match="'layer' is computed again in the backward pass"):
        y.backward()


@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_watched_only_where_they_may_be_computed_again(training):
    """No hook slows the backward pass elsewhere; nothing is noted in inference."""
    seen = []
    for reentrant in (None, False):
        model = adapted(reentrant, rank=2).train(training)
        model.first.register_forward_hook(lambda m, a, y: seen.append(bool(y._backward_hooks)))
        model(x())
        with veneer.using(model), torch.no_grad():
            model(x())
        assert bool(model.first.deltas.passes.bare) is training
        with veneer.using(model):
            model(x().detach()).sum()  # without a gradient in the second layer's input
    assert seen == [False, False, False, True, False, False]


def test_two_passes_of_different_states_in_one_backward_are_an_error():
    model = adapted(False, rank=2)
    with veneer.using(model, "a"):
        first = model(x()).square().sum()
    with veneer.using(model, "b"):
        second = model(x()).square().sum()
        with pytest.raises(ERRORS):
            (first + second).backward()


@pytest.mark.parametrize("reentrant", KINDS)
@pytest.mark.parametrize("first", ["reference", "policy"])
def test_a_reference_without_gradients_is_no_other_state(reentrant, first):
    model = adapted(reentrant, rank=2)
    reference = contextlib.nullcontext()
    policy = None
    for which in ["reference", "policy"] if first == "reference" else ["policy", "reference"]:
        if which == "reference":
            with torch.no_grad(), veneer.using(model):
                reference = model(x())
        else:
            policy = model(x())
    (policy - reference).square().sum().backward()
    assert gradients(model)


def test_without_checkpointing_states_may_change_before_the_backward():
    model, again = adapted(None, rank=2), adapted(None, rank=2)
    with veneer.using(model, {"a": 0.5}):
        y = model(x()).square().sum()
    y.backward()
    with veneer.using(again, {"a": 0.5}):
        again(x()).square().sum().backward()
    for n, g in gradients(again).items():
        torch.testing.assert_close(gradients(model)[n], g, rtol=0, atol=0)


def test_a_training_goes_on_after_the_error():
    model = adapted(False, rank=2)
    with veneer.using(model, "a"):
        y = model(x()).square().sum()
    with pytest.raises(ERRORS):
        y.backward()
    model.zero_grad()
    model(x()).square().sum().backward()
    plain = adapted(None, rank=2)
    plain(x()).square().sum().backward()
    for n, g in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[n], g, rtol=1e-12, atol=1e-12)


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def test_rows_of_a_bank_that_change_before_the_backward_are_an_error():
    model = checkpointed(llama())
    for name in ("a", "b"):
        veneer.attach(model, "lora", rank=2, name=name)
        randomise(model, name)
    bank = veneer.bank(model, ["a", "b"], trainable=True)
    ids = torch.arange(3, 15).view(2, 6)
    bank.use(["a", "b"])
    model(input_ids=ids).logits.square().sum().backward()
    assert all(g.isfinite().all() for g in gradients(model).values())
    y = model(input_ids=ids).logits.square().sum()
    bank.use(["b", "a"])
    with pytest.raises((SiteError, RuntimeError), match=r"computed again|modified by an inplace operation"):
        y.backward()


def test_copies_and_pickles_hold_no_notes():
    model = adapted(False, rank=2)
    with torch.no_grad():
        model(x())
    assert model.first.deltas.passes.bare
    assert not copy.deepcopy(model).first.deltas.passes.bare
