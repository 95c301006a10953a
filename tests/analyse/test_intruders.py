"""Intruder dimensions and the likeness of adapters against numpy's dense decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.adapters import llama, shake
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.analyse.intruders import intruders, scale_intruders
from veneer.analyse.likeness import likeness
from veneer.errors import ConfigError, NotMergeable


def dense(W, D, k):
    """Returns the cosines of the k leading left vectors of W + D to the nearest of W, by full SVDs."""
    U0 = np.linalg.svd(W, full_matrices=False)[0]
    Y = np.linalg.svd(W + D, full_matrices=False)[0][:, :k]
    return np.abs(U0.T @ Y).max(0)


def planted(out, in_, size, rank=2):
    """Returns a layer with a change of this size along directions that mix many of W's own."""
    torch.manual_seed(3)
    layer = nn.Sequential(nn.Linear(in_, out))
    with torch.no_grad():
        U, _, Vh = torch.linalg.svd(layer[0].weight, full_matrices=False)
        falling = 0.8 ** torch.arange(min(out, in_), dtype=torch.float32)
        layer[0].weight.copy_(U * falling @ Vh)
    model = veneer.attach(layer, "lora", to=["0"], rank=rank, alpha=float(rank))
    (_, delta), *_ = changes(model, "default")
    with torch.no_grad():
        delta.A.copy_(torch.linalg.qr(torch.randn(in_, rank)).Q.mT)
        delta.B.copy_(size * (U @ torch.linalg.qr(torch.randn(min(out, in_), rank)).Q))
    return model


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("size", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_counts_equal_a_dense_svd(shape, size, threshold):
    model = planted(*shape, size)
    (found,) = intruders(model, "default", k=6, threshold=threshold)
    (site, delta), *_ = changes(model, "default")
    W, D = (t.detach().double().numpy() for t in (site.weight(), delta.delta(site)))
    np.testing.assert_allclose(found.cosines, dense(W, D, 6), atol=2e-3)
    assert found.count == (dense(W, D, 6) < threshold).sum()
    if size == 0:
        assert found.count == 0 and min(found.cosines) > 0.99
    if size == 3.0:
        assert found.count >= 1


def test_scaling_removes_intruders_exactly():
    model = planted(24, 40, 3.0)
    (site, delta), *_ = changes(model, "default")
    W, D = (t.detach().double().numpy() for t in (site.weight(), delta.delta(site)))
    U, S, Vh = np.linalg.svd(W + D, full_matrices=False)
    inside = dense(W, D, 6) < 0.5
    n = scale_intruders(model, "default", "healed", 0.25, k=6)
    assert n == inside.sum() > 0
    expected = D + (0.25 - 1) * (U[:, :6][:, inside] * S[:6][inside]) @ Vh[:6][inside]
    (_, healed), *_ = changes(model, "healed")
    np.testing.assert_allclose(healed.delta(site).detach().numpy(), expected, atol=2e-3)
    assert healed.A.shape[0] == 2 + n
    assert scale_intruders(model, "default", "same", 1.0, k=6) == n
    (_, same), *_ = changes(model, "same")
    np.testing.assert_allclose(same.delta(site).detach().numpy(), D, atol=1e-5)


def test_an_adapter_that_is_like_itself_and_unlike_its_complement():
    model = llama()
    for name in ("a", "b", "opposite"):
        veneer.attach(model, "lora", rank=2, name=name, seed=len(name))
        shake(model, name)
    with torch.no_grad():
        for (_, a), (_, o) in zip(changes(model, "a"), changes(model, "opposite"), strict=True):
            o.A.copy_(a.A)
            o.B.copy_(-a.B)
    assert all(
        s.cosine == pytest.approx(1) and s.outputs == pytest.approx(1) for s in likeness(model, "a", "a")
    )
    assert all(
        s.cosine == pytest.approx(-1) and s.inputs == pytest.approx(1)
        for s in likeness(model, "a", "opposite")
    )
    for found, (site, a), (_, b) in zip(
        likeness(model, "a", "b"), changes(model, "a"), changes(model, "b"), strict=True
    ):
        D, E = (d.delta(site).detach().double().numpy() for d in (a, b))
        assert found.cosine == pytest.approx((D * E).sum() / np.linalg.norm(D) / np.linalg.norm(E), abs=1e-5)
        UD, UE = (np.linalg.svd(M)[0][:, :2] for M in (D, E))
        assert found.outputs == pytest.approx((UD.T @ UE).__pow__(2).sum() / 2, abs=1e-5)


def test_a_dense_change_is_compared_too():
    model = veneer.attach(veneer.attach(llama(), "lora", rank=2, name="a"), "dora", rank=2, name="b")
    shake(model, "a")
    shake(model, "b")
    assert all(-1 <= s.cosine <= 1 and 0 <= s.outputs <= 1 + 1e-6 for s in likeness(model, "a", "b"))


def test_bad_numbers_and_adapters_without_a_layer_in_common():
    model = veneer.attach(
        veneer.attach(llama(), "lora", to=["q_proj"], name="a"), "lora", to=["v_proj"], name="b"
    )
    with pytest.raises(ConfigError, match="change no layer in common"):
        likeness(model, "a", "b")
    for given, text in (({"k": 0}, "k must be 1"), ({"threshold": 0.0}, "threshold must be in")):
        with pytest.raises(ConfigError, match=text):
            intruders(model, "a", **given)
    with pytest.raises(ConfigError, match=r"factor must be in \[0, 1\], got 2"):
        scale_intruders(model, "a", "c", 2.0)
    dense_change = veneer.attach(llama(), "dora", to=["q_proj"], rank=2)
    shake(dense_change)
    with pytest.raises(NotMergeable, match="the change has no low-rank factors"):
        scale_intruders(dense_change, "default", "c", 0.5)
    assert veneer.adapters(dense_change) == ["default"]
