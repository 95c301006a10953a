"""Base and adapters in one kernel against a float64 closed form, run by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from support.interpreted import interpreted

from veneer.ops.fused import product as fused
from veneer.ops.segmented import Segment

pytest.importorskip("triton")
# rows of each segment, its place and strength; None: rows without an adapter
MIXED = [(3, None, 1.0), (1, 0, 1.0), (1, 1, 1.0), (40, 2, 0.5), (16, 4, -1.25), (2, None, 1.0), (17, 3, 1.0)]


@pytest.fixture
def kernel():
    """The kernel as Triton's interpreter runs it."""
    with interpreted() as found:
        yield found


def draw(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def planned(segments, device="cpu"):
    found, start = [], 0
    for rows, place, strength in segments:
        if place is not None:
            found.append((start, Segment(0, place, rows, strength)))
        start += rows
    return fused.plan(found, start, torch.device(device))


def closed_form(x, W, bias, A, B, segments):
    """The rows of each segment by its own W' = W + s B A, in float64."""
    found, start = [], 0
    for rows, place, strength in segments:
        own = (
            W.double() if place is None else W.double() + strength * B[place].double().mT @ A[place].double()
        )
        found.append(x[start : start + rows].double() @ own.mT)
        start += rows
    return torch.cat(found) + (0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("segments", "shape", "biased"),
    [
        (MIXED, (70, 50, 5), True),
        ([(33, 1, 2.0)], (64, 64, 16), False),  # one adapter for all rows: plain LoRA
        ([(1, i, 1.0) for i in range(5)], (130, 33, 1), False),  # a token of each request
        ([(5, 0, 1.0), (20, 3, 1.0)], (96, 200, 20), True),
    ],
)
def test_each_row_is_its_own_adapter_s(dtype, segments, shape, biased, kernel):
    n_in, n_out, rank = shape
    total = sum(rows for rows, *_ in segments)
    x, W = draw(total, n_in, seed=0, dtype=dtype), draw(n_out, n_in, seed=1, dtype=dtype)
    A, B = draw(5, rank, n_in, seed=2, dtype=dtype), draw(5, rank, n_out, seed=3, dtype=dtype)
    bias = draw(n_out, seed=4, dtype=dtype) if biased else None
    y = fused.product(x, W, bias, {0: (A, B)}, planned(segments))
    right = closed_form(x, W, bias, A, B, segments)
    # Sums of n_in products in float32; h and y are rounded to dtype.
    rounding = torch.finfo(dtype).eps + n_in**0.5 * torch.finfo(torch.float32).eps
    assert float((y.double() - right).norm() / right.norm()) <= rounding
    assert y.dtype == dtype and kernel.INTERPRETED


def test_views_of_stacks_and_of_weights_are_read_in_place(kernel):
    x, W = draw(20, 30, seed=0, dtype=torch.float32), draw(30, 24, seed=1, dtype=torch.float32).mT
    A, B = draw(4, 8, 30, seed=2, dtype=torch.float32), draw(4, 24, 8, seed=3, dtype=torch.float32).mT
    segments = [(12, 3, 1.0), (8, 0, 1.0)]
    y = fused.product(x, W, None, {0: (A[:, :3], B[:, :3])}, planned(segments))
    right = closed_form(x, W, None, A[:, :3], B[:, :3], segments)
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)


def test_rows_of_several_stacks_and_of_layers_without_one(kernel):
    x, W = draw(9, 16, seed=0, dtype=torch.float32), draw(12, 16, seed=1, dtype=torch.float32)
    stacks = {
        n: (draw(2, n, 16, seed=n, dtype=x.dtype), draw(2, n, 12, seed=-n, dtype=x.dtype)) for n in (2, 4)
    }
    found = [(0, Segment(2, 1, 4)), (4, Segment(4, 0, 3)), (7, Segment(8, 0, 2))]
    y = fused.product(x, W, None, stacks, fused.plan(found, 9, x.device))
    for rows, own in ((slice(0, 4), (2, 1)), (slice(4, 7), (4, 0)), (slice(7, 9), None)):
        right = x[rows] @ W.mT
        if own:
            A, B = stacks[own[0]]
            right = right + x[rows] @ A[own[1]].mT @ B[own[1]]
        torch.testing.assert_close(y[rows], right, rtol=1e-5, atol=1e-5)


def test_dtypes_and_ranks_that_the_kernel_takes():
    assert fused.fits(torch.empty(2, 2), 64) and fused.fits(torch.empty(2, 2, dtype=torch.bfloat16), 1)
    assert not fused.fits(torch.empty(2, 2), 65) and not fused.fits(torch.empty(2, 2).double(), 4)


@pytest.mark.parametrize(("dtype", "rank"), [("bf16", 16), ("fp32", fused.MOST_RANK)])
def test_the_kernel_compiles_for_a_gpu(dtype, rank, tmp_path, monkeypatch):
    """Down to the machine code of an A100, without one: compilers refuse more than the interpreter."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from veneer.ops.fused import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {
        "m": fused.ROWS,
        "n": fused.COLUMNS,
        "k": fused.DEPTH,
        "r": rank,
        "has_bias": True,
        "widen": False,
    }
    pointers = dict.fromkeys(("x", "W", "bias", "A", "B", "y"), f"*{dtype}")
    pointers |= {**dict.fromkeys(("starts", "counts", "places"), "*i32"), "strengths": "*fp32"}
    names = [p.name for p in kernel._tile.params]
    kinds = {n: "constexpr" if n in sizes else pointers.get(n, "i32") for n in names}
    source = ASTSource(kernel._tile, kinds, {(names.index(n),): v for n, v in sizes.items()})
    made = compiled(source, target=GPUTarget("cuda", 80, 32))
    assert len(made.asm["cubin"]) > 0 and made.metadata.shared <= 96 * 1024  # bytes of a block's memory
