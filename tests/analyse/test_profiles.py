"""Profiles and drift of changes against dense decompositions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.adapters import llama, shake
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.switch import train_only, using
from veneer.analyse.activations import gram_distortion
from veneer.analyse.drift import drift
from veneer.analyse.profiles import profiles
from veneer.errors import ConfigError
from veneer.train import full

K = 4


def falling(model):
    """Gives every linear layer singular values that fall by a fifth, so that directions are determined."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            U, _, Vh = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            values = 3 * 0.8 ** torch.arange(len(Vh), dtype=Vh.dtype)
            module.weight.data.copy_(U * values @ Vh)
    return model


def angles(P, Q):
    return np.degrees(np.arccos(np.clip(np.linalg.svd(P.T @ Q, compute_uv=False), 0, 1)))


def expected(W, D, rank):
    """Returns the profile by full decompositions."""
    U, S, Vh = np.linalg.svd(W)
    tuned = np.linalg.svd(W + D)[2]
    left, values, right = np.linalg.svd(D)
    n = min(K, rank)
    return {
        "values": S[:K],
        "retention": [abs(U[:, i] @ D @ Vh[i]) for i in range(K)],
        "adaptation": [np.linalg.norm(D @ Vh[i]) for i in range(K)],
        "cosines": [abs(Vh[i] @ tuned[i]) for i in range(K)],
        "stable_rank": (np.linalg.norm(D) / values[0]) ** 2,
        "outputs": angles(left[:, :n], U[:, :K]),
        "inputs": angles(right[:n].T, Vh[:K].T),
    }


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("dora", {})])
def test_profiles_equal_full_decompositions(method, options):
    model = veneer.attach(falling(llama()), method, rank=3, **options)
    shake(model)
    found = profiles(model, "default", k=K)
    assert len(found) == len(changes(model, "default"))
    for profile, (site, delta) in zip(found, changes(model, "default"), strict=True):
        W, D = (t.detach().double().numpy() for t in (site.weight(), delta.delta(site)))
        wanted = expected(W, D, 3 if method == "lora" else K)
        assert profile.site == site.name
        for name, values in wanted.items():
            tolerance = 0.2 if name in ("outputs", "inputs") else 2e-3
            np.testing.assert_allclose(getattr(profile, name), values, atol=tolerance, err_msg=name)


def test_a_change_of_all_weights_is_profiled_and_an_empty_one_has_no_rank():
    model, before = falling(llama()), falling(llama()).state_dict()
    torch.manual_seed(1)
    train_only(model, "base")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "down_proj" in n:
                p.add_(0.1 * torch.randn_like(p))
    after = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    full.as_change(model, before, "tuned")
    found = {p.site: p for p in profiles(model, "tuned", k=K)}
    for name, profile in found.items():
        W = before[name].double().numpy()
        D = after[name] - W
        if np.linalg.norm(D):
            wanted = expected(W, D, K)
            np.testing.assert_allclose(profile.retention, wanted["retention"], atol=2e-3)
            np.testing.assert_allclose(profile.stable_rank, wanted["stable_rank"], rtol=1e-2)
        else:
            assert profile.stable_rank == 0 and profile.outputs == [] and max(profile.adaptation) == 0
    assert any("down_proj" in name for name in found)
    with pytest.raises(ConfigError, match="k must be 1 or more, got 0"):
        profiles(model, "tuned", k=0)


def test_drift_is_that_of_the_layers_inputs():
    model, ids = veneer.attach(llama(), "lora", rank=3), torch.arange(24).view(2, 12)
    shake(model)
    found = drift(model, "default", {"input_ids": ids})
    (site, delta), *_ = changes(model, "default")
    seen = []
    hook = site.module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with using(model), torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    h = seen[0].flatten(0, 1).double().numpy()
    W, D = (t.detach().double().numpy() for t in (site.weight(), delta.delta(site)))
    moved = (h @ D.T) ** 2
    assert found[0].site == site.name and len(found) == len(changes(model, "default"))
    assert found[0].relative == pytest.approx(moved.sum() / ((h @ W.T) ** 2).sum(), rel=1e-4)
    assert found[0].unit == pytest.approx(moved.sum() / (D**2).sum() / (h**2).sum(), rel=1e-4)


def test_cosines_of_rows_are_compared():
    torch.manual_seed(0)
    X = torch.randn(9, 5, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert gram_distortion(X, 2 * X @ Q) == pytest.approx(0, abs=1e-12)
    Y = torch.randn(9, 5, dtype=torch.float64)
    C, D = (np.array([[a @ b / a.norm() / b.norm() for b in M] for a in M]) for M in (X, Y))
    assert gram_distortion(X, Y) == pytest.approx(np.linalg.norm(D - C) / np.linalg.norm(C))
