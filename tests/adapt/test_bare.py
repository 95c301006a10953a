"""Changes of bare parameters act in every form that their module computes in, and leave nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from support import experts
from torch import nn

import veneer
from veneer.adapt import calls
from veneer.adapt.acting import groups
from veneer.adapt.acting.bare import changed
from veneer.adapt.attached import changes, layers
from veneer.errors import ConfigError, ShapeError, SiteError
from veneer.sites.bare.site import ParameterSite, shelf_of


def merged(model, *names):
    """The logits of a copy whose weights hold the changes."""
    model = copy.deepcopy(model)
    veneer.merge(model, *names, probe={})
    return experts.logits(model)


@pytest.mark.parametrize(
    ("kind", "way"), [("mixtral", "batched_mm"), ("gpt_oss", "batched_mm"), ("gpt_oss", "grouped_mm")]
)
def test_gains_act_where_many_experts_are_multiplied_at_once(kind, way):
    model = experts.model(kind, way)
    experts.shake(veneer.attach(model, "dora", to="experts", rank=3), scale=0.3)
    torch.testing.assert_close(experts.logits(model), merged(model), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_sums_with_changes_without_factors_are_dense_and_keep_their_strengths(kind):
    """A LoRA at two experts, and beside it changes of another form at some of these and at others."""
    model = experts.model(kind).double()
    for name, method, to in (
        ("low", "lora", r".*experts\.[01]\.\w+"),
        ("turn", "hra", r".*experts\.[12]\.\w+"),
        ("odd", "bat", r".*experts\.[13]\.\w+"),
    ):
        veneer.attach(model, method, to=to, name=name, rank=8 if method == "bat" else 2)
        experts.shake(model, scale=0.3)
    strengths = {"low": 0.5, "turn": 0.25, "odd": -2.0}
    with veneer.using(model, strengths):
        torch.testing.assert_close(experts.logits(model), merged(model, strengths), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_stack_of_changes_has_the_largest_rank_and_none_for_the_others(kind):
    model = experts.model(kind, "batched_mm")
    veneer.attach(model, "lora", to=r".*experts\.[02]\.down_proj", rank=2, rank_pattern={r"0\.down_proj": 5})
    shelf = next(s for m in model.modules() if (s := shelf_of(m)))
    (holders,) = shelf.by_parameter().values()
    with torch.no_grad():
        W = changed(holders[0].owner, "down_proj", holders)
    out, in_ = 32, 48
    assert W.low(None).A.shape == (4, 5, in_) and W.low(None).B.shape == (4, out, 5)
    assert W.low(None) is W.low(None)  # made once a call
    assert W.low(2).A.shape == (2, in_) and W.low(2).B.shape == (out, 2)
    assert W.low(1).A.shape == (0, in_) and W.low(1).B.shape == (out, 0)


@pytest.mark.parametrize(
    ("method", "to"),
    [("lora", "experts"), ("dora", "experts"), ("hra", "experts"), ("lora", ["q_proj"]), ("full", ["norm"])],
)
@pytest.mark.parametrize("way", ["eager", "batched_mm"])
@pytest.mark.parametrize("bank", [False, True])
def test_calls_are_noted_in_evaluation_and_in_training(method, to, way, bank):
    """Or the checks of the first step would take the layers for unreached ones."""
    model = experts.model("mixtral", way)
    veneer.attach(model, method, to=to, **({} if method == "full" else {"rank": 2}))
    if bank:
        if method in ("hra", "full"):
            pytest.skip("has no normal form")
        veneer.bank(model, ["default"], trainable=True).use("default")
    assert not any(d.called or d.stepped for d in layers(model))
    with pytest.raises(SiteError, match="adapted layers were never called"):
        calls.check_called(model)
    experts.logits(model)
    calls.check_called(model)
    assert not any(d.stepped for d in layers(model))
    experts.logits(model.train())
    calls.check_called(model, in_step=True)
    assert all(d.called for d in layers(model) if d.stepped)


def test_a_call_that_fails_runs_for_no_other_adapter():
    model = experts.model("mixtral")
    for name in ("a", "b"):
        veneer.attach(model, "lora", name=name, to="experts", rank=2)
    veneer.bank(model, ["a", "b"]).use(["a", "b"])
    host = next(m for m in model.modules() if shelf_of(m))
    tried = []

    def fail(x):
        tried.append(len(x))
        raise RuntimeError("out of order")

    host.act_fn.forward = fail
    with pytest.raises(RuntimeError, match="out of order"):
        experts.logits(model)
    assert len(tried) == 1
    assert all(type(p) is nn.Parameter for p in host._parameters.values())


def test_a_bank_of_experts_acts_at_strength_1_alone():
    model = experts.model("mixtral")
    veneer.attach(model, "lora", to="experts", rank=2)
    veneer.bank(model, ["default"])
    with veneer.using(model, {"bank": 0.5}), pytest.raises(ConfigError, match=r"strength 1 .*0\.5"):
        experts.logits(model)


@pytest.mark.parametrize(
    ("forward", "wanted"),
    [
        (lambda x, top_k_index: x, True),
        (lambda x, router_indices, weights: x, True),
        (lambda top_k_index, x: x, False),
        (lambda x, weights, selected_experts: x, False),
        (lambda top_k_index: top_k_index, False),
    ],
)
def test_experts_are_routed_by_token_if_their_second_argument_is_the_choice(forward, wanted):
    model = veneer.attach(experts.model("mixtral"), "lora", to="experts", rank=2)
    veneer.attach(model, "full", to=["norm"], name="whole")
    site = changes(model, "default")[0][0]
    assert isinstance(site, ParameterSite) and groups.by_token(site)
    site.host.forward = forward
    assert groups.by_token(site) is wanted
    site.module.index = None
    assert not groups.by_token(site) and not groups.by_token(changes(model, "whole")[0][0])


TOKENS = torch.arange(10.0).view(5, 2)


class Rows:
    """Two adapters: one for the tokens 3 and 0, the other for the rest."""

    def groups(self, tokens):
        assert tokens == 5
        return [("a", torch.tensor([3, 0])), ("b", torch.tensor([1, 2, 4]))]


def test_groups_of_tokens_are_run_apart_and_put_together_again():
    choice = torch.arange(5)
    args = TOKENS, choice, "as it is"
    found = groups.groups_of(Rows(), nn.Identity(), args)
    first = groups.chosen(args, found[0].tokens)
    assert torch.equal(first[0], TOKENS[[3, 0]]) and first[1].tolist() == [3, 0] and first[2] == "as it is"
    run = lambda group, own: -own[0]  # noqa: E731
    assert torch.equal(groups.rest(groups.Waiting(args, found), -first[0], run), -TOKENS)
    for odd in (lambda g, own: own[0].tolist(), lambda g, own: own[0][1:]):
        with pytest.raises(ShapeError, match="must return a tensor of one row a token"):
            groups.rest(groups.Waiting(args, found), -first[0], odd)
    with pytest.raises(ShapeError, match="must return a tensor of one row a token"):
        groups.rest(groups.Waiting(args, found), TOKENS, run)


@pytest.mark.parametrize("args", [(TOKENS,), (TOKENS, torch.arange(4)), (TOKENS, 3), ()])
def test_calls_that_are_not_by_token_are_refused(args):
    with pytest.raises(SiteError, match=r"a Identity must be called with tensors of one row a token"):
        groups.groups_of(Rows(), nn.Identity(), args)
