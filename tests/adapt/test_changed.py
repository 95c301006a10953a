"""A weight in the place of a parameter: operations see W', and products keep the factors apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.adapt.acting.changed import Changed, Low, _padded

N, OUT, IN, ROWS = 3, 5, 7, 4


def made(flipped, gains, rank=2, dtype=torch.float64, out=OUT, in_=IN):
    """A stack with its change, and W' (n, out, in) written out in float64."""
    draw = torch.Generator().manual_seed(rank)
    W, A, B, excess = (
        torch.randn(N, *shape, generator=draw, dtype=torch.float64).to(dtype)
        for shape in ((out, in_), (rank, in_), (out, rank), (out,))
    )

    def low(index):
        index = slice(None) if index is None else index
        return Low(A[index], B[index], excess[index] if gains else None)

    scale = 1 + excess.double() if gains else torch.ones(N, out, dtype=torch.float64)
    full = scale[:, :, None] * W.double() + torch.einsum("nok,nki->noi", B.double(), A.double())
    return Changed.of(W.mT.contiguous() if flipped else W, low, flipped=flipped), full


def inputs(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


X, V, BIAS = inputs(N, ROWS, IN), inputs(ROWS, IN), inputs(OUT)
LIST = torch.tensor([2, 0, 2, 1])
XS = inputs(len(LIST), ROWS, IN)

# (in, out) as kept: the operation, and the same on W' (n, out, in). All products keep the factors apart.
FLIPPED = {
    "bmm": (lambda C: torch.bmm(X, C), lambda W: X @ W.mT),
    "x.bmm": (lambda C: X.bmm(C), lambda W: X @ W.mT),
    "matmul": (lambda C: torch.matmul(X, C), lambda W: X @ W.mT),
    "x.matmul": (lambda C: X.matmul(C), lambda W: X @ W.mT),
    "@": (lambda C: X @ C, lambda W: X @ W.mT),
    "one input for all": (lambda C: V @ C, lambda W: V @ W.mT),
    "turned": (lambda C: torch.bmm(C.transpose(1, 2), X.mT), lambda W: W @ X.mT),
    "turned by torch": (lambda C: torch.transpose(C, -1, -2) @ X.mT, lambda W: W @ X.mT),
    "mT": (lambda C: C.mT @ X.mT, lambda W: W @ X.mT),
    "one": (lambda C: V @ C[1], lambda W: V @ W[1].T),
    "mm": (lambda C: torch.mm(V, C[-1]), lambda W: V @ W[-1].T),
    "v.mm": (lambda C: V.mm(C[torch.tensor(2)]), lambda W: V @ W[2].T),
    "linear of one turned": (lambda C: F.linear(V, C[0].t(), BIAS), lambda W: V @ W[0].T + BIAS),
    "linear of one turned by torch": (lambda C: F.linear(V, torch.t(C[0])), lambda W: V @ W[0].T),
    "some": (lambda C: torch.bmm(XS, C[LIST]), lambda W: XS @ W[LIST].mT),
    "some by 32 bits": (lambda C: torch.bmm(XS, C[LIST.int()]), lambda W: XS @ W[LIST].mT),
    "masked": (lambda C: X[1:] @ C[torch.tensor([False, True, True])], lambda W: X[1:] @ W[1:].mT),
}
STRAIGHT = {
    "bmm": (lambda C: torch.bmm(C, X.mT), lambda W: W @ X.mT),
    "c.bmm": (lambda C: C.bmm(X.mT), lambda W: W @ X.mT),
    "@": (lambda C: C @ X.mT, lambda W: W @ X.mT),
    "turned": (lambda C: X @ C.transpose(2, 1), lambda W: X @ W.mT),
    "turned from behind": (lambda C: X @ C.transpose(-2, -1), lambda W: X @ W.mT),
    "mT": (lambda C: X @ C.mT, lambda W: X @ W.mT),
    "linear": (lambda C: F.linear(V, C[1], BIAS), lambda W: V @ W[1].T + BIAS),
    "linear without a bias": (lambda C: F.linear(X, C[2]), lambda W: X @ W[2].T),
    "linear of a vector": (lambda C: F.linear(V[0], C[1], BIAS), lambda W: V[0] @ W[1].T + BIAS),
    "linear by names": (lambda C: F.linear(V, weight=C[0], bias=BIAS), lambda W: V @ W[0].T + BIAS),
    "linear by all names": (lambda C: F.linear(input=V, weight=C[0]), lambda W: V @ W[0].T),
    "one by 32 bits": (lambda C: F.linear(V, C[torch.tensor(1).int()]), lambda W: V @ W[1].T),
    "one turned": (lambda C: V @ C[0].transpose(0, 1), lambda W: V @ W[0].T),
    "one turned back and forth": (lambda C: F.linear(V, C[0].mT.transpose(1, 0)), lambda W: V @ W[0].T),
    "some": (lambda C: torch.bmm(C[LIST], XS.mT), lambda W: W[LIST] @ XS.mT),
}
WAYS = [(True, n) for n in FLIPPED] + [(False, n) for n in STRAIGHT]


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize(("flipped", "name"), WAYS)
def test_products_are_those_of_the_changed_weight_without_building_it(flipped, name, gains, monkeypatch):
    C, W = made(flipped, gains)
    monkeypatch.setattr(Changed, "dense", lambda self: pytest.fail("the dense sum was built"))
    act, wanted = (FLIPPED if flipped else STRAIGHT)[name]
    found = act(C)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, wanted(W), rtol=1e-12, atol=1e-12)


MASK = torch.randn(N, OUT, IN, generator=torch.Generator().manual_seed(3)) > 0
# Operations of any kind on a stack (n, out, in).
OTHERS = {
    "a sum": lambda C: C.sum(),
    "a sum by name": lambda C: torch.sum(input=C, dim=1, keepdim=True),
    "a list": lambda C: torch.cat([C, C], 1),
    "a tuple": lambda C: torch.stack((C[0], C[2])),
    "einsum": lambda C: torch.einsum("noi,nti->nto", C, X),
    "with a vector": lambda C: C @ V[0],
    "of one with a vector": lambda C: C[1] @ V[0],
    "a vector for all": lambda C: V[0] @ C.mT,
    "a vector for one": lambda C: V[0] @ C[1].mT,
    "with one for all": lambda C: C @ V.mT,
    "two stacks": lambda C: torch.bmm(C, C.mT),
    "two stacks, the other way": lambda C: torch.bmm(C.mT, C),
    "a linear layer of itself": lambda C: F.linear(C[0], C[1]),
    "an input of a linear layer": lambda C: F.linear(C[0], V, V[:, 0]),
    "a bias": lambda C: F.linear(V.mT, inputs(OUT, ROWS), C[0].mT),
    "by names": lambda C: torch.matmul(C, other=X.mT),
    "turned by names": lambda C: C.transpose(dim0=1, dim1=2) @ inputs(OUT, 2),
    "a dimension with itself": lambda C: C[0].transpose(1, 1).contiguous(),
    "other dimensions": lambda C: C.transpose(0, 1).contiguous(),
    "the last and the first": lambda C: C.transpose(0, 2).contiguous(),
    "a row of one": lambda C: C[0][1],
    "a truth": lambda C: C[True],
    "a truth as a tensor": lambda C: C[torch.tensor(True)],
    "a table of numbers": lambda C: C[LIST.view(2, 2)],
    "a slice": lambda C: C[1:],
    "a mask of rows": lambda C: C[MASK[:, :, 0]],
    "a mask of numbers": lambda C: C[MASK],
    "a list of numbers": lambda C: C[[2, 0]],
}


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_any_other_operation_sees_the_changed_weight(name, flipped, gains):
    C, W = made(flipped, gains)
    C = C.mT if flipped else C
    found = OTHERS[name](C)
    torch.testing.assert_close(torch.as_tensor(found), OTHERS[name](W), rtol=1e-12, atol=1e-12)


def test_a_transpose_may_be_the_weight_of_a_linear_layer():
    C, W = made(True, True)
    torch.testing.assert_close(F.linear(V[:, :OUT], C[0]), V[:, :OUT] @ W[0], rtol=1e-12, atol=1e-12)


def test_a_stack_cannot_be_turned_as_one_matrix():
    C, W = made(False, False)
    for stack in (C, W):
        with pytest.raises(RuntimeError, match="2"):
            stack.t()


def test_questions_without_numbers_build_nothing(monkeypatch):
    C, _ = made(True, True)
    monkeypatch.setattr(Changed, "dense", lambda self: pytest.fail("the dense sum was built"))
    assert (C.shape, len(C), C.size(1), C.dim(), C.numel()) == ((N, IN, OUT), N, IN, 3, N * IN * OUT)
    assert (C.dtype, C.device.type, C.ndim, C.stride(-1)) == (torch.float64, "cpu", 3, 1)
    assert C.is_floating_point() and not C.is_cuda


WIDE = 8, 12  # out and in, of whole groups of 16 bytes
OFFS = torch.tensor([2, 2, 7], dtype=torch.int32)  # the second matrix has no row


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("rank", [0, 3, 4])
@pytest.mark.parametrize("more", [0, 2])
def test_grouped_products_keep_the_factors_apart(gains, rank, more, monkeypatch):
    """more: rows behind the last group, which belong to nobody."""
    C, W = made(True, gains, rank, torch.float32, *WIDE)
    x = inputs(7 + more, WIDE[1], dtype=torch.float32)
    monkeypatch.setattr(Changed, "dense", lambda self: pytest.fail("the dense sum was built"))
    found = F.grouped_mm(x, C, offs=OFFS)
    wanted = torch.cat([x[:2].double() @ W[0].T, x[2:7].double() @ W[2].T])
    torch.testing.assert_close(found[:7].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flipped", [False, True])
def test_other_grouped_products_see_the_changed_weight(flipped):
    C, W = made(flipped, True, 2, torch.float32, *WIDE)
    C, wanted = (C if flipped else C.mT), W.float().mT
    x, xs = (inputs(*rows, WIDE[1], dtype=torch.float32) for rows in ((7,), (N, ROWS)))
    by_place = torch._grouped_mm(x, C, OFFS)
    torch.testing.assert_close(by_place, torch._grouped_mm(x, wanted, OFFS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(F.grouped_mm(xs, C), xs @ wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(F.grouped_mm(C.mT, xs.mT), (xs @ wanted).mT, rtol=1e-5, atol=1e-5)
    ends = torch.tensor([4, 12], dtype=torch.int32)  # of the inputs of one matrix
    parts = torch.stack([x[:, :4] @ wanted[1, :4], x[:, 4:] @ wanted[1, 4:]])
    torch.testing.assert_close(F.grouped_mm(x, C[1], offs=ends), parts, rtol=1e-5, atol=1e-5)
    back, x = C.mT, inputs(7, WIDE[0], dtype=torch.float32)
    wanted = torch._grouped_mm(x, wanted.mT.contiguous(), OFFS)
    torch.testing.assert_close(F.grouped_mm(x, back, offs=OFFS), wanted, rtol=1e-5, atol=1e-5)
    x = inputs(7, WIDE[1], dtype=torch.float32)
    with pytest.raises(RuntimeError):  # PyTorch takes no bias yet; it must not be lost
        torch._grouped_mm(x, C, offs=OFFS, bias=inputs(WIDE[0]).float(), out_dtype=None)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("rank", [1, 3, 8, 9])
def test_ranks_are_filled_with_zeros_up_to_16_bytes(rank, itemsize):
    A, B = inputs(N, rank, IN), inputs(N, OUT, rank)
    found = _padded(Low(A, B, None), itemsize)
    assert found.A.shape[1] == found.B.shape[2] == -(-rank * itemsize // 16) * 16 // itemsize
    assert torch.equal(found.A[:, :rank], A) and torch.equal(found.B[..., :rank], B)
    assert not found.A[:, rank:].any() and not found.B[..., rank:].any()


class Counting(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rank", "products"), [(0, 1), (2, 3)])
def test_a_matrix_without_a_change_costs_its_own_product_alone(rank, products):
    C, W = made(False, False, rank)
    with Counting() as counted:
        y = F.linear(V, C[1])
    assert counted.products == products
    torch.testing.assert_close(y, V @ W[1].T)


@pytest.mark.parametrize("gains", [False, True])
def test_factors_of_another_dtype_follow_the_input(gains):
    W, A, B, e = (t.bfloat16().float() for t in (V, inputs(2, IN), inputs(ROWS, 2), inputs(ROWS)))
    x = inputs(3, IN).bfloat16()
    C = Changed.of(W.bfloat16(), lambda _: Low(A, B, e if gains else None), flipped=False)
    wanted = (1 + gains * e) * (x.float() @ W.T) + x.float() @ A.T @ B.T
    found = F.linear(x, C)
    assert found.dtype == C.dense().dtype == torch.bfloat16
    assert float((found.float() - wanted).norm()) < 2e-2 * float(wanted.norm())
    dense = (1 + gains * e)[:, None] * W + B @ A
    assert float((C.dense().float() - dense).norm()) < 1e-2 * float(dense.norm())
