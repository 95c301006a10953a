"""The ways to y + (x A') B for rows of many adapters: one sum, whatever the ids, and a bad adapter kept to
its rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.ops import batched

WAYS = ["gather", "bucket", "masked", "grouped"]


def drawn(b, t, n, r, in_, out, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    x, y, A, B = numbers(b, t, in_), numbers(b, t, out), numbers(n, r, in_), numbers(n, r, out)
    A[0], B[0] = 0, 0
    return x, y, A, B, torch.randint(0, n, (b,), generator=draw)


def one_by_one(x, y, A, B, ids):
    return torch.stack([y[i] + x[i] @ A[k].T @ B[k] for i, k in enumerate(ids.tolist())])


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 6),
    t=st.integers(1, 3),
    n=st.integers(2, 5),
    r=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_every_way_is_the_sum_for_each_row(way, b, t, n, r, seed):
    x, y, A, B, ids = drawn(b, t, n, r, 5, 7, seed=seed)
    expected = one_by_one(x, y, A, B, ids)
    torch.testing.assert_close(batched.add(x, y, A, B, ids, way=way), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [3, 8])
def test_the_grouped_product_of_torch_and_a_loop_agree(r, dtype):
    x, y, A, B, ids = drawn(6, 2, 5, r, 16, 24, dtype)
    expected = one_by_one(*(t.double() for t in (x, y, A, B)), ids)
    found = batched.add(x, y, A, B, ids, way="grouped")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=32 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("way", ["gather", "bucket", "grouped"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_adapter_spoils_its_own_rows_alone(way, bad):
    x, y, A, B, _ = drawn(5, 2, 4, 2, 5, 7)
    ids = torch.tensor([2, 1, 0, 2, 3])
    expected = one_by_one(x, y, A, B, ids)
    A[2], B[2, 0] = bad, bad
    found = batched.add(x, y, A, B, ids, way=way)
    own = ids == 2
    assert not found[own].isfinite().any()
    torch.testing.assert_close(found[~own], expected[~own])


@pytest.mark.parametrize("way", WAYS)
def test_a_finite_adapter_whose_product_overflows_spoils_its_own_rows_alone(way):
    x, y, A, B, ids = (t if t.dtype == torch.long else t.float() for t in drawn(4, 2, 4, 3, 8, 5))
    x, ids = torch.ones_like(x), torch.tensor([2, 1, 0, 3])
    A[2] = 1e38  # its sum of eight is above float32's largest number
    expected = one_by_one(x, y, A, B, ids)
    found = batched.add(x, y, A, B, ids, way=way)
    assert found.isfinite().flatten(1).all(1).tolist() == [False, True, True, True]
    torch.testing.assert_close(found[1:], expected[1:])


@pytest.mark.parametrize("way", ["gather", "bucket", "grouped"])
def test_gradients(way):
    x, y, A, B, ids = drawn(4, 2, 3, 2, 3, 4)
    inputs = tuple(t.requires_grad_() for t in (x, y, A, B))
    assert torch.autograd.gradcheck(lambda x, y, A, B: batched.add(x, y.clone(), A, B, ids, way=way), inputs)


@pytest.mark.parametrize(
    ("b", "t", "n", "r", "finite", "way"),
    [
        (64, 1, 65, 4, True, "masked"),
        (
            64,
            1,
            65,
            4,
            False,
            "bucket",
        ),  # where something may not be finite, nothing is computed with all factors
        (64, 1, 65, 16, True, "bucket"),
        (8, 1, 65, 16, True, "gather"),  # few rows of many adapters: most buckets would be empty
        (8, 128, 9, 16, True, "gather"),
    ],
)
def test_the_way_is_chosen_by_size(b, t, n, r, finite, way):
    x, A = torch.empty(b, t, 32), torch.empty(n, r, 32)
    ids = torch.arange(b) % (n - 1) + 1
    with torch.no_grad():
        assert batched.choose(x, A, finite=finite, layout=batched.lay_out(ids, n)) == way
    learning = batched.choose(x, A, finite=finite, layout=batched.lay_out(ids, n))
    assert learning == (
        way if finite else "gather"
    )  # the gradient of an empty place in a bucket is 0 times a factor
    assert batched.choose(x, A, finite=finite, layout=None) == ("masked" if way == "masked" else "gather")


def test_rows_that_share_an_adapter_choose_no_buckets():
    x, A, ids = torch.empty(64, 1, 32), torch.empty(65, 16, 32), torch.full((64,), 3)
    assert batched.choose(x, A, finite=True, layout=batched.lay_out(ids, 65)) == "gather"
