"""The product with a matrix that is built twice and never kept: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer.methods import DenseDelta
from veneer.ops import recomputed


def outer(u, v):
    return u[:, None] * torch.sin(v)


def made(*, frozen=()):
    torch.manual_seed(0)
    given = {"x": torch.randn(2, 3, 7), "u": torch.randn(5), "v": torch.randn(7)}
    return [t.double().requires_grad_(n not in frozen) for n, t in given.items()]


@pytest.mark.parametrize("frozen", [(), ("x",), ("u",), ("u", "v"), ("x", "v")])
def test_values_and_gradients_are_those_of_the_plain_product(frozen):
    x, u, v = made(frozen=frozen)
    y = recomputed.product(x, outer, (u, v))
    plain = x @ outer(u, v).mT
    assert torch.equal(y, plain)
    wanted = [t for t in (x, u, v) if t.requires_grad]
    direction = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad(y, wanted, direction), torch.autograd.grad(plain, wanted, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_matrix_is_built_twice_and_not_kept():
    x, u, v = made()
    kept, built = [], []

    def build(u, v):
        built.append(1)
        return outer(u, v)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = recomputed.product(x, build, (u, v))
    assert kept == [(2, 3, 7), (5,), (7,)] and len(built) == 1
    y.sum().backward()
    assert len(built) == 2


def test_second_order_is_refused():
    x, u, v = made()
    with pytest.raises(RuntimeError, match="second order"):
        torch.autograd.grad(recomputed.product(x, outer, (u, v)).sum(), u, create_graph=True)


class Outer(DenseDelta):
    """A full change of W from two vectors."""

    def __init__(self, site):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.zeros(site.out)), nn.Parameter(torch.ones(site.in_))

    def delta(self, site):
        return outer(self.u, self.v)


def test_a_dense_change_keeps_no_matrix():
    model = veneer.attach(nn.Sequential(nn.Linear(7, 5)), Outer)
    model(torch.randn(3, 7)).sum().backward()  # the first pass looks at which layers are called
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = model(torch.randn(3, 7))
    assert (3, 7) in kept and (5, 7) not in kept and (7, 5) not in kept
    before = model[0].deltas["default"].u.grad.clone()
    y.sum().backward()
    assert not torch.equal(model[0].deltas["default"].u.grad, before)
