"""Merging: the verdict, what is refused, and what is left."""

from __future__ import annotations

import copy

import pytest
import torch
from support.adapters import IDS, llama, shake

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.merge import foresee, merge
from veneer.errors import ConfigError, NotMergeable


def adapted(dtype, size, **options):
    model = veneer.attach(llama().to(dtype).eval(), "lora", rank=2, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, delta in changes(model, "default"):
            delta.B.add_(size * torch.randn_like(delta.B))
    return model


def test_a_merge_that_keeps_the_change_says_how_much():
    model = adapted(torch.float32, 1e-2)
    y = model(IDS).logits
    verdict = merge(model, probe={"input_ids": IDS})
    assert not verdict.lost and verdict.error < 1e-4 and verdict.logit_error < 1e-3
    assert len(verdict.sites) == 14 and str(verdict).startswith("kept: rounding took 0.0%")
    torch.testing.assert_close(model(IDS).logits, y)
    assert veneer.adapters(model) == []


def test_a_change_below_bfloat16_is_refused_before_anything_is_written():
    model = adapted(torch.bfloat16, 1e-6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        NotMergeable,
        match=r"the adapter would be lost in the merge: LOST: rounding took \d+\.\d% of the"
        r" change.*\n.*force=True",
    ) as e:
        merge(model)
    assert e.value.exit_code == 3
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and veneer.adapters(
        model
    ) == ["default"]
    forced = merge(model, probe={"input_ids": IDS}, force=True)
    assert forced.lost and forced.error > 0.9


def test_a_change_that_the_outputs_do_not_show_is_refused_and_said_to_be_that():
    model = adapted(torch.float32, 0.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        NotMergeable,
        match=r"default does not change the outputs on the probe, .*; train it first, give another probe=",
    ):
        merge(model, probe={"input_ids": IDS})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and veneer.adapters(
        model
    ) == ["default"]
    assert not merge(model, probe={}).lost  # nothing was compared


def test_the_error_is_what_rounding_took():
    """Recomputed here from the definition: ||round(W + D) - W - D|| / ||D||."""
    model = adapted(torch.bfloat16, 3e-3)
    squares = []
    for site, delta in changes(model, "default"):
        W, D = site.weight().float(), delta.delta(site).float()
        squares.append((((W + D).bfloat16().float() - W - D).norm() ** 2, D.norm() ** 2))
    lost, all_ = (sum(s) for s in zip(*squares, strict=True))
    verdict = foresee(model, {"default": 1.0})
    assert (
        verdict.error == pytest.approx(float((lost.detach() / all_.detach()).sqrt()), rel=1e-3)
        and 0.01 < verdict.error < 0.5
    )


def test_a_full_change_of_a_tied_weight_is_merged_once():
    model = veneer.attach(llama(tie=True), "full", to=["embed_tokens", "lm_head"])
    W, D = model.lm_head.weight.detach().clone(), 0.1 * torch.randn_like(model.lm_head.weight)
    with torch.no_grad():
        for _, delta in changes(model, "default"):
            delta.D.copy_(D.view_as(delta.D))
    merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight.detach(), W + D)


def test_merging_at_a_strength_and_several_at_once():
    model = adapted(torch.float32, 1e-2)
    veneer.attach(model, "dora", rank=2, to=["v_proj"], name="second")
    shake(model, "second")
    with veneer.using(model, {"default": 0.5}, "second"):
        y = model(IDS).logits
    merge(model, {"default": 0.5}, "second")
    torch.testing.assert_close(model(IDS).logits, y)


def test_merging_under_another_adapter_is_refused():
    model = adapted(torch.float32, 1e-2)
    veneer.attach(model, "lora", rank=2, name="second")
    with pytest.raises(ConfigError, match="merging would change the base under second; detach them first"):
        merge(model, "default")
    with pytest.raises(ConfigError, match="no adapter called 'defalt' is attached; did you mean 'default'"):
        merge(model, "defalt")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge(llama())


def test_the_effect_on_the_outputs_is_compared_and_a_merge_that_spoils_it_is_undone(monkeypatch):
    """logit_error recomputed from its definition; then a writer that damages the weights, as a bad
    quantiser would."""
    import veneer.adapt.merge as module

    model = adapted(torch.bfloat16, 3e-3)
    with veneer.using(model, "default"):
        on = model(IDS).logits.float()
    with veneer.using(model):
        off = model(IDS).logits.float()
    twin = copy.deepcopy(model)
    verdict = merge(model, probe={"input_ids": IDS}, limit=10)
    assert verdict.logit_error == pytest.approx(
        float((model(IDS).logits.float() - on).norm() / (on - off).norm()), rel=1e-4
    )
    before = {n: t.clone() for n, t in twin.state_dict().items()}
    real = module._write

    def spoils(model, wanted):
        ties = real(model, wanted)
        for d in module.layers(model):
            d.site.set_weight(d.site.weight() * 1.5)
        return ties

    monkeypatch.setattr(module, "_write", spoils)
    with pytest.raises(
        NotMergeable, match=r"of its effect on the outputs \(0 of 14 layers lost more than 1000%"
    ):
        merge(twin, limit=10)
    assert all(torch.equal(t, before[n]) for n, t in twin.state_dict().items()) and veneer.adapters(twin) == [
        "default"
    ]
