"""Decompositions of one matrix against the papers' formulas, and what must hold for any matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import lowrank as oracle
from torch import nn

from veneer.compress.lowrank.anchored import _candidate
from veneer.compress.lowrank.blockwise import alone
from veneer.compress.lowrank.moments import Moments
from veneer.compress.lowrank.recipe import recipe
from veneer.ops.matrix.whitening import decompose, regularised
from veneer.sites import site_for

SHAPES = [(48, 40), (24, 40), (40, 40)]


def case(out: int, in_: int, rows: int = 2000, seed: int = 0):
    """W, b and inputs of a strongly anisotropic covariance with a mean."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(in_, in_)) * np.logspace(0, -2, in_)
    X = draw.normal(size=(rows, in_)) @ mix + 0.3 * draw.normal(size=in_)
    return draw.normal(size=(out, in_)) / in_**0.5, draw.normal(size=out), X


def tensor(M) -> torch.Tensor:
    return torch.as_tensor(np.asarray(M), dtype=torch.float64)


def made(metric: str, W, b, X, rank: int, form: str = "plain"):
    """The layer that a metric makes of W, b."""
    layer = nn.Linear(W.shape[1], W.shape[0]).double()
    layer.weight.data, layer.bias.data = tensor(W), tensor(b)
    inputs = Moments()
    for piece in np.array_split(X, 7):
        inputs.add(tensor(piece))
    site = site_for("0", layer)
    return alone(site, inputs, recipe("svd", metric=metric)).layer(site, rank, form)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_each_method_is_its_paper_s_formula(out, in_, form):
    (W, b, X), rank = case(out, in_), 12
    expected = {
        "weights": (oracle.svd(W, rank), b),
        "inputs": (oracle.svd_llm(W, X, rank), b),
        "outputs": oracle.lord(W, b, X, rank),
        "centred": oracle.lord(W, b, X, rank),
    }
    for metric, (V, c) in expected.items():
        layer = made(metric, W, b, X, rank, form)
        atol = 1e-9 if metric == "weights" else 1e-4  # the moments are regularised by a millionth
        np.testing.assert_allclose(layer.weight.detach(), V, rtol=0, atol=atol)
        np.testing.assert_allclose(layer.bias.detach(), c, rtol=0, atol=atol)


def test_errors_are_in_the_order_that_the_metrics_promise():
    (W, b, X), rank = case(48, 40), 12
    error = {}
    for metric in ("weights", "inputs", "centred"):
        layer = made(metric, W, b, X, rank)
        error[metric] = oracle.reconstruction(
            W, b, layer.weight.detach().numpy(), layer.bias.detach().numpy(), X
        )
    assert error["centred"] < error["inputs"] < 0.7 * error["weights"]


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_a_metric_of_outputs_is_whitening_on_both_sides(out, in_):
    W, _, X = case(out, in_)
    G = np.random.default_rng(1).normal(size=(3000, out)) * np.logspace(0, -1.5, out)
    C, R = tensor(X.T @ X / len(X)), tensor(G.T @ G / len(G))
    parts = decompose(tensor(W), C, R)
    for rank in (1, 7, min(out, in_)):
        V = (parts.B[:, :rank] @ parts.A[:rank]).numpy()
        np.testing.assert_allclose(V, oracle.kfac(W, X, G, rank), rtol=0, atol=1e-9)
        D = tensor(W - V)
        lost = torch.trace(R @ D @ C @ D.mT)
        torch.testing.assert_close(lost, parts.losses()[rank], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_one_eigendecomposition_is_whitening_and_a_singular_value_decomposition(out, in_):
    W, _, X = case(out, in_)
    C = tensor(X.T @ X / len(X))
    L = torch.linalg.cholesky(C)
    U, S, Vh = torch.linalg.svd(tensor(W) @ L, full_matrices=False)
    parts = decompose(tensor(W), C)
    torch.testing.assert_close(parts.S, S, rtol=1e-7, atol=1e-9)
    for rank in (1, 9):
        whitened = (U[:, :rank] * S[:rank]) @ torch.linalg.solve_triangular(L.mT, Vh[:rank].mT, upper=True).mT
        torch.testing.assert_close(parts.B[:, :rank] @ parts.A[:rank], whitened, rtol=0, atol=1e-8)


def test_both_sides_have_one_optimum():
    W, _, X = case(30, 30)
    C = regularised(tensor(X.T @ X / len(X)), 1e-9)
    pad = torch.zeros(1, 30, dtype=torch.float64)
    by_outputs, by_inputs = decompose(tensor(W), C), decompose(torch.cat([tensor(W), pad]), C)
    for rank in (3, 20):
        a = by_outputs.B[:, :rank] @ by_outputs.A[:rank]
        b = by_inputs.B[:, :rank] @ by_inputs.A[:rank]
        torch.testing.assert_close(a, b[:-1], rtol=0, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(out=st.integers(1, 12), in_=st.integers(1, 12), seed=st.integers(0, 2**31), rank=st.integers(1, 12))
def test_centring_never_raises_the_error(out, in_, seed, rank):
    W, b, X = case(out, in_, rows=80, seed=seed)
    rank, errors = min(rank, out, in_), {}
    for metric in ("inputs", "centred"):
        layer = made(metric, W, b, X, rank)
        V, c = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        errors[metric] = oracle.reconstruction(W, b, V, c, X)
    assert errors["centred"] <= errors["inputs"] + 1e-5


@pytest.mark.parametrize("metric", ["weights", "inputs", "outputs", "centred"])
@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_full_rank_changes_nothing(metric, out, in_):
    W, b, X = case(out, in_)
    layer = made(metric, W, b, X, min(out, in_))
    np.testing.assert_allclose(layer.weight.detach(), W, rtol=0, atol=1e-9)
    np.testing.assert_allclose(layer.bias.detach(), b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("centred", [False, True])
def test_the_anchored_form_is_the_best_for_the_inputs_that_it_gets(centred):
    W, _, X = case(20, 16, rows=600)
    Z = X + 0.3 * np.random.default_rng(2).normal(size=X.shape) @ np.diag(np.linspace(0, 1, 16))
    layer = nn.Linear(16, 20, bias=False).double()
    layer.weight.data = tensor(W)
    original, given_ = Moments(), Moments()
    original.add(tensor(X))
    given_.add(tensor(Z))
    cross = tensor(X.T @ Z)
    site = site_for("0", layer)
    chosen = recipe("svd", metric="centred" if centred else "inputs", anchored=True)
    found = _candidate(site, original, given_, cross, None, chosen).layer(site, 5, "plain")
    if centred:
        V = oracle.anchored(W, X - X.mean(0), Z - Z.mean(0), 5)
        np.testing.assert_allclose(found.bias.detach(), W @ X.mean(0) - V @ Z.mean(0), rtol=0, atol=1e-4)
    else:
        V = oracle.anchored(W, X, Z, 5)
    np.testing.assert_allclose(found.weight.detach(), V, rtol=0, atol=1e-4)


def test_moments_do_not_depend_on_how_rows_come():
    X = tensor(np.random.default_rng(0).normal(size=(100, 5)))
    whole, parts = Moments(), Moments()
    whole.add(X)
    for piece in X.split(7):
        parts.add(piece)
    assert whole.n == parts.n == 100
    torch.testing.assert_close(parts.moment(True), torch.cov(X.T, correction=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.moment(), parts.moment(), rtol=1e-12, atol=1e-12)
