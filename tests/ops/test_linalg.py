"""Decompositions against numpy's exact ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import ShapeError
from veneer.ops.draws import keyed
from veneer.ops.matrix import linalg
from veneer.ops.matrix.linalg import (
    effective_rank,
    leading_svd,
    leading_svds,
    norm_without,
    product_norm,
    product_spectrum,
    row_norms,
    row_norms_of_sum,
)


def spectrum_matrix(out, in_, values, seed=0):
    g = np.random.default_rng(seed)
    U, V = np.linalg.qr(g.normal(size=(out, out)))[0], np.linalg.qr(g.normal(size=(in_, in_)))[0]
    k = min(out, in_)
    return torch.tensor((U[:, :k] * values[:k]) @ V[:, :k].T)


@pytest.mark.parametrize(("out", "in_"), [(96, 80), (80, 96), (20, 20)])
def test_the_randomised_svd_is_close_to_the_exact_one(out, in_):
    values = np.arange(1, 100) ** -0.5  # slow decay: the hard case (specification: 1 % at twice the rank)
    W = spectrum_matrix(out, in_, values)
    U, S, Vh = leading_svd(W, 8, keyed(0, "w"))
    exact = torch.linalg.svdvals(W)[:8]
    best = (W - (lambda u, s, v: (u[:, :8] * s[:8]) @ v[:8])(*torch.linalg.svd(W))).norm()
    assert ((S - exact).abs() / exact).max() < 0.01
    assert (W - (U * S) @ Vh).norm() / best - 1 < 1e-3
    torch.testing.assert_close(U.mT @ U, torch.eye(8, dtype=W.dtype))


def test_the_same_draw_gives_the_same_factors():
    W = torch.randn(200, 150, generator=keyed(0, "W"))
    one, two, other = (leading_svd(W, 4, keyed(0, n)) for n in ("a", "a", "b"))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True)) and not torch.equal(one[0], other[0])


@pytest.mark.parametrize(("out", "in_"), [(96, 80), (80, 96), (20, 12)])  # the last one is decomposed exactly
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)]
)
def test_a_stack_has_the_factors_of_one_at_a_time(out, in_, dtype, tolerance):
    Ws = [spectrum_matrix(out, in_, np.arange(1, 100) ** -0.5, seed).to(dtype) for seed in range(3)]
    names = ["a", "b", "c"]
    for W, n, (U, S, Vh) in zip(Ws, names, leading_svds(Ws, 4, [keyed(0, n) for n in names]), strict=True):
        u, s, v = leading_svd(W, 4, keyed(0, n))
        assert (U.shape, S.shape, Vh.shape, U.dtype) == (u.shape, s.shape, v.shape, u.dtype)
        assert float(((U * S) @ Vh - (u * s) @ v).norm() / s.norm()) <= tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
@pytest.mark.parametrize("r", [1, 5, 12])
def test_what_is_left_without_a_product_is_told_without_the_difference(r, dtype, tolerance):
    W = torch.randn(30, 20, dtype=torch.float64).to(dtype)
    B, A = torch.randn(30, r, dtype=torch.float64), torch.randn(r, 20, dtype=torch.float64) / r
    B, A = (t.to(torch.promote_types(dtype, torch.float32)) for t in (B, A))
    expected = np.linalg.norm(W.double().numpy() - (B.double() @ A.double()).numpy()) / np.linalg.norm(
        W.double().numpy()
    )
    assert norm_without(W, B, A) == pytest.approx(expected, rel=tolerance)
    assert norm_without(torch.zeros(30, 20), B.float(), A.float()) == 0


def test_a_rank_out_of_range_is_refused():
    with pytest.raises(ShapeError, match=r"rank 5 > min\(out, in\) = 4; use at most 4"):
        leading_svd(torch.zeros(4, 9), 5, keyed(0, ""))
    with pytest.raises(ShapeError, match="rank must be >= 1, got 0"):
        leading_svd(torch.zeros(4, 9), 0, keyed(0, ""))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 15), st.integers(0, 10**6))
def test_products_without_forming_them(out, in_, r, seed):
    g = torch.Generator().manual_seed(seed)
    B, A, W = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((out, r), (r, in_), (out, in_)))
    D = (B @ A).numpy()
    k = min(out, in_, r)
    np.testing.assert_allclose(
        product_spectrum(B, A)[:k], np.linalg.svd(D, compute_uv=False)[:k], rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(product_norm(B, A), np.linalg.norm(D), rtol=1e-9)
    expected = np.linalg.norm(W.numpy() + D, axis=1)
    np.testing.assert_allclose(
        row_norms_of_sum(W, row_norms(W).square(), A, B), expected, rtol=1e-6, atol=1e-6
    )


def test_row_norms_of_sum_makes_nothing_of_the_size_of_W():
    """The largest tensor that any operation inside returns is (out, r)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not any(
                isinstance(a, torch.Tensor) and a.data_ptr() == result.data_ptr() for a in args
            ):
                sizes.append(result.numel())
            return result

    W, A, B = torch.randn(64, 48).bfloat16(), torch.randn(4, 48), torch.randn(64, 4)
    squares = row_norms(W).square()
    with Watch():
        row_norms_of_sum(W, squares, A, B)
    assert sizes and max(sizes) <= 64 * 4


def test_effective_rank():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def spectrum(name: str, d: int) -> torch.Tensor:
    k = torch.arange(1, d + 1, dtype=torch.float64)
    return {
        "a power law": k**-0.5,
        "outliers": torch.cat([10 * 0.6 ** k[:4], k[4:] ** -0.3]),
        "one of a thousand": torch.cat([1e4 * torch.ones(1), k[1:] ** -0.5]),
        "flat": k**-0.05,
    }[name]


@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["a power law", "outliers", "one of a thousand", "flat"])
def test_a_sketch_is_as_good_whatever_its_products_round(name, narrow, monkeypatch):
    """The precision and the iterations follow the error, not the processor."""
    monkeypatch.setattr(linalg, "multiplies_bf16", lambda where: narrow)
    d, rank, draw = 384, 16, torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))[0] for _ in range(2))
    S = spectrum(name, d)
    W = (U * S @ V.mT).float()
    u, s, vh = linalg.leading_svd(W, rank, torch.Generator().manual_seed(1))
    left = (W.double() - u.double() * s @ vh.double()).norm() / S[rank:].norm()
    assert 1 - 1e-6 < left < 1 + {"flat": 2e-2}.get(name, 1e-3)


def test_missing_iterations_are_counted_from_the_spectrum():
    flat, steep = torch.ones(8), 4.0 ** -torch.arange(8)
    assert linalg._more(steep, 2, 3) == 0 and linalg._more(flat, 2, 3) == linalg.MORE
    assert linalg._more(torch.tensor([1.0, 1.0, 0.6]), 2, 3) == 2  # 0.01 * 0.6 ** 9 is 1.0077e-4
    assert linalg._more(torch.tensor([1.0, 1.0, 0.6]), 2, 5) == 0
