"""Sums of adapters against numpy's best low-rank approximation of the dense sum."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.adapters import IDS, llama, shake
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.combine import combine, extract, to_lora
from veneer.errors import ConfigError, FormatError, NotMergeable, ShapeError
from veneer.ops.draws import keyed
from veneer.ops.matrix.truncate import choose_rank, truncate, truncate_product
from veneer.ops.voting import dare, ties, trim


def crowded():
    """Adapters of four kinds and ranks on one base, all moved from their starts."""
    model = llama().double().eval()
    veneer.attach(model, "lora", rank=3, name="plain")
    veneer.attach(model, "lora", rank=4, stabilised=True, name="rs")
    veneer.attach(model, "lora", rank=2, init="pissa", name="pissa")
    veneer.attach(model, "dora", rank=2, to=["q_proj", "up_proj"], name="dora")
    for name in veneer.adapters(model):
        shake(model, name)
    return model


def dense(model, weights):
    found = {}
    for n, w in weights.items():
        for site, delta in changes(model, n):
            found[site.name] = found.get(site.name, 0) + w * delta.delta(site).detach().numpy()
    return found


def best(D, rank):
    U, S, V = np.linalg.svd(D, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


@pytest.mark.parametrize(
    "weights",
    [
        {"plain": 0.7, "rs": 0.3},
        {"plain": 1.0, "rs": -0.5, "pissa": 2.0},
        {"plain": 0.5, "dora": 0.5, "pissa": 1.0},
    ],
)
@pytest.mark.parametrize("rank", [1, 5])
def test_a_combination_is_the_best_approximation_of_the_dense_sum(weights, rank):
    model = crowded()
    exact = dense(model, weights)
    cuts = {c.site: c for c in combine(model, weights, "mix", rank=rank)}
    assert set(cuts) == set(exact)
    for site, delta in changes(model, "mix"):
        D, wanted = delta.delta(site).detach().numpy(), best(exact[site.name], rank)
        assert np.linalg.norm(D - wanted) <= 1e-6 * np.linalg.norm(exact[site.name])
        lost = np.linalg.norm(exact[site.name] - wanted) / np.linalg.norm(exact[site.name])
        assert cuts[site.name].error == pytest.approx(lost, rel=1e-6, abs=1e-9)


def test_without_a_cut_the_sum_is_exact_and_the_base_untouched():
    model = crowded()
    with veneer.using(model, {"plain": 0.7, "pissa": -0.4}):
        y = model(IDS).logits
    before = {n: p.clone() for n, p in model.named_parameters() if "deltas" not in n}
    cuts = combine(model, {"plain": 0.7, "pissa": -0.4}, "mix")
    with veneer.using(model, "mix"):
        torch.testing.assert_close(model(IDS).logits, y, rtol=1e-9, atol=1e-9)
    assert max(c.error for c in cuts) < 1e-12 and {c.rank for c in cuts} == {7}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_any_method_becomes_plain_lora_at_an_energy():
    model = crowded()
    exact = dense(model, {"dora": 1.0})
    for c in to_lora(model, "dora", "plain-dora", energy=0.9):
        S = np.linalg.svd(exact[c.site], compute_uv=False)
        share = np.cumsum(S**2) / (S**2).sum()
        assert c.rank == int(np.argmax(share >= 0.9)) + 1 and c.error == pytest.approx(
            (1 - share[c.rank - 1]) ** 0.5, rel=1e-6
        )


def test_ties_follows_the_paper_on_a_case_by_hand():
    a, b = torch.tensor([[4.0, -3.0, 1.0, 0.5]]), torch.tensor([[2.0, 5.0, -0.1, 3.0]])
    assert torch.equal(trim(a, 0.5), torch.tensor([[4.0, -3.0, 0.0, 0.0]]))
    # trimmed: [4,-3,0,0], [0,5,0,3]; signs by mass: +,+,0,+; means of those that agree: 4, 5, 0, 3
    assert torch.equal(ties([a, b], [1.0, 1.0], 0.5), torch.tensor([[4.0, 5.0, 0.0, 3.0]]))


def test_ties_has_two_forms_that_differ_in_what_weights_do():
    a, b = torch.tensor([[4.0, -3.0]]), torch.tensor([[2.0, 5.0]])
    mean, scaled = (ties([a, b], [0.5, 1.0], 1.0, scaled=s) for s in (False, True))
    # weighted: [2, -1.5], [2, 5]; signs +, +; those that agree: both, b alone
    torch.testing.assert_close(mean, torch.tensor([[4 / 1.5, 5.0]]))
    torch.testing.assert_close(scaled, torch.tensor([[4 / 2, 5.0]]))
    assert torch.equal(ties([a], [0.5], 1.0), a) and torch.equal(ties([a], [0.5], 1.0, scaled=True), 0.5 * a)
    same = [ties([a, b], [1.0, 1.0], 0.5, scaled=s) for s in (False, True)]
    assert torch.equal(*same)


def test_dare_keeps_the_mean():
    D = torch.full((400, 400), 2.0)
    kept = dare(D, 0.25, keyed(0, "x"))
    assert (
        set(kept.unique().tolist()) == {0.0, 8.0} and abs(float(kept.mean()) - 2) < 6 * (12 / 160000) ** 0.5
    )
    assert torch.equal(kept, dare(D, 0.25, keyed(0, "x")))


@pytest.mark.parametrize("how", ["ties", "ties-scaled", "dare"])
def test_ties_and_dare_need_a_cut_and_reach_the_outputs(how):
    model = crowded()
    with pytest.raises(
        NotMergeable,
        match=f"'plain' at 'model.layers.0.self_attn.q_proj': {how} leaves no low rank; give rank="
        " or energy=",
    ):
        combine(model, {"plain": 1.0, "rs": 1.0}, "mix", how=how)
    combine(model, {"plain": 1.0, "rs": 1.0}, "mix", how=how, rank=4)
    with veneer.using(model, "mix"):
        on = model(IDS).logits
    with veneer.using(model):
        assert not torch.allclose(on, model(IDS).logits)


def test_impossible_combinations_are_refused():
    model = crowded()
    for call, text in (
        (
            lambda: combine(model, {"plain": 1.0}, "mix", how="tis"),
            "unknown way to combine 'tis'; did you mean 'ties'",
        ),
        (lambda: combine(model, {}, "mix"), "nothing to combine"),
        (
            lambda: combine(model, {"plian": 1.0}, "mix"),
            "no adapter called 'plian' is attached; did you mean 'plain'",
        ),
        (lambda: combine(model, {"plain": 1.0}, "rs"), "'rs' is already attached"),
        (lambda: combine(model, {"plain": 1.0}, "mix", density=0.0), r"density must be in \(0, 1\], got 0.0"),
        (lambda: combine(model, {"plain": 1.0}, "mix", energy=1.5), r"energy must be in \(0, 1\], got 1.5"),
        (lambda: combine(model, {"plain": 1.0}, "mix", rank=0), "rank must be >= 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            call()
    with pytest.raises(
        NotMergeable, match=r"'dora' at 'model.*': its change has no low rank; give rank= or energy="
    ):
        combine(model, {"plain": 0.5, "dora": 1.0}, "mix")
    assert "mix" not in veneer.adapters(model)


def tuned_copy(model):
    tuned = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            if "proj" in n:
                p.add_(
                    torch.randn(p.shape[0], 2, dtype=p.dtype)
                    @ torch.randn(2, p.shape[1], dtype=p.dtype)
                    * 0.05
                )
    return tuned


def test_extraction_gives_back_a_low_rank_change():
    model = llama().double().eval()
    tuned = tuned_copy(model)
    cuts = extract(model, tuned, "found", energy=1 - 1e-12)
    assert {c.rank for c in cuts} == {2} and len(cuts) == 14
    torch.testing.assert_close(model(IDS).logits, tuned(IDS).logits, rtol=1e-6, atol=1e-6)


def test_extraction_says_nothing_where_it_leaves_out_nothing(recwarn):
    model = llama().double().eval()
    extract(model, tuned_copy(model), "found", rank=2, rest="drop")
    assert not [w for w in recwarn if "leaves out" in str(w.message)]


def test_extraction_is_open_about_the_rest():
    model = llama().double().eval()
    tuned = tuned_copy(model)
    with torch.no_grad():
        tuned.model.norm.weight.mul_(1.5)
        tuned.model.embed_tokens.weight.add_(0.1)
    with pytest.raises(
        FormatError,
        match=r"2 parameters outside the layers of to= differ too: model\.embed_tokens\.weight,"
        r" model\.norm\.weight",
    ):
        extract(model, tuned, "found", rank=2)
    extract(model, tuned, "whole", rank=2, rest="keep")
    torch.testing.assert_close(model(IDS).logits, tuned(IDS).logits, rtol=1e-6, atol=1e-6)
    with veneer.using(model):
        assert not torch.allclose(model(IDS).logits, tuned(IDS).logits)
    veneer.detach(model)
    text = r"leaves out 2 other parameters: model\.embed_tokens\.weight, model\.norm\.weight"
    with pytest.warns(UserWarning, match=text):
        extract(model, tuned, "part", rank=2, rest="drop")
    assert len(changes(model, "part")) == 14
    with pytest.raises(FormatError, match="the same weights"):
        extract(model, copy.deepcopy(llama().double()), "none", rank=2)
    with pytest.raises(ConfigError, match="how far to cut"):
        extract(model, tuned, "none")
    with pytest.raises(
        ShapeError,
        match=r"differ in their parameters' shapes: lm_head\.weight: \(30, 16\) and \(31, 16\), model\.embed",
    ):
        other = copy.deepcopy(llama())
        other.resize_token_embeddings(31, mean_resizing=False)
        extract(llama(), other, "none", rank=2)


def test_a_checkpoint_with_added_tokens_gives_its_linear_layers():
    base, tuned = llama().double(), llama().double()
    tuned.load_state_dict(base.state_dict())
    tuned.resize_token_embeddings(33, mean_resizing=False)
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight.add_(
            torch.randn(16, 2).double() @ torch.randn(2, 16).double()
        )
        tuned.model.norm.weight.add_(1)
    for rest in ("refuse", "keep"):
        with pytest.raises(ShapeError, match=r"take the base with the same vocabulary, or rest='drop'"):
            extract(base, tuned, "x", rank=2, rest=rest)
    with pytest.warns(UserWarning, match=r"leaves out 3 other parameters: model\.norm\.weight, "):
        (cut,) = extract(base, tuned, "x", rank=2, rest="drop")
    assert cut.error < 1e-9 and cut.site == "model.layers.0.self_attn.q_proj"


def test_layers_of_other_shapes_are_refused_whatever_is_dropped():
    tuned = copy.deepcopy(llama())
    tuned.model.layers[0].mlp.up_proj = nn.Linear(16, 99, bias=False)
    with pytest.raises(ShapeError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: \("):
        extract(llama(), tuned, "x", rank=2, rest="drop")


def test_the_chosen_rank():
    S = torch.tensor([4.0, 2.0, 1.0, 1e-12])
    assert (
        choose_rank(S, None, None) == 3
        and choose_rank(S, 2, None) == 2
        and choose_rank(S, None, 0.76) == 1
        and choose_rank(S, None, 0.77) == 2
    )
    assert choose_rank(torch.zeros(3), None, 0.5) == 1
    g = torch.Generator().manual_seed(0)
    B, A = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((9, 4), (4, 7)))
    whole, cut = truncate_product(B, A), truncate(B @ A, 2)
    torch.testing.assert_close(whole.B @ whole.A, B @ A)
    torch.testing.assert_close(truncate_product(B, A, 2).B @ truncate_product(B, A, 2).A, cut.B @ cut.A)
