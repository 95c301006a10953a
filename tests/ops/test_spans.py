"""Spans of rows get the change of their own adapter, by as much work as alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from veneer.ops import spans
from veneer.ops.spans import Span

IN, OUT = 6, 5


def drawn(ids, ranks, *, each=3, grad=True):
    """Returns x (b, each, in), y (b, each, out), the spans of ids, and factors by adapter, 0 the base."""
    draw = torch.Generator().manual_seed(len(ids))

    def tensor(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_(grad)

    own = [None, *((tensor(r, IN), tensor(OUT, r)) for r in ranks)]
    return tensor(len(ids), each, IN), tensor(len(ids), each, OUT), spans.of(ids), own


def plain(x, y, found, own):
    """Returns the same sum by ordinary operations, a row at a time."""
    rows = []
    for span in found:
        for i in range(span.start, span.stop):
            pair = own[span.own]
            rows.append(y[i] if pair is None else y[i] + x[i] @ pair[0].mT @ pair[1].mT)
    return torch.stack(rows)


CASES = [
    ([1, 2, 3], (2, 2, 2)),
    ([1, 1, 2, 0, 3], (2, 4, 4)),
    ([0, 0], (1,)),
    ([2, 2, 1, 1], (3, 3)),
    ([1], (4,)),
]


@pytest.mark.parametrize(("ids", "ranks"), CASES)
def test_every_span_gets_its_own_change_and_gradients(ids, ranks):
    x, y, found, own = drawn(ids, ranks)
    used = [t for span in found for t in own[span.own] or ()]
    made = spans.add(x, y, found, [own[s.own] for s in found], writable=False)
    wanted = plain(x, y, found, own)
    torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)
    into = [x, y, *used] if used else [y]
    weights = torch.arange(made.numel(), dtype=torch.float64).view_as(made).cos()
    pairs = zip(*(torch.autograd.grad((t * weights).sum(), into) for t in (made, wanted)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_differences():
    x, y, found, own = drawn([1, 1, 2, 3, 0], (2, 3, 3), each=2)
    flat = [t for pair in own[1:] for t in pair]

    def act(x, y, *flat):
        pairs = [None, *zip(flat[::2], flat[1::2], strict=True)]
        return spans.add(x, y, found, [pairs[s.own] for s in found], writable=False)

    assert torch.autograd.gradcheck(act, (x, y, *flat))


def test_a_writable_sum_is_made_in_place():
    x, y, found, own = drawn([1, 2, 0], (2, 3), grad=False)
    wanted, before = plain(x, y, found, own), y.data_ptr()
    made = spans.add(x, y, found, [own[s.own] for s in found], writable=True)
    assert made.data_ptr() == before
    torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)


def test_one_span_may_stand_for_all_entries():
    x, y, _, own = drawn([1, 1, 1], (2,))
    made = spans.add(x, y, [Span(1, 0, 1)], [own[1]], writable=False)
    torch.testing.assert_close(made, plain(x, y, [Span(1, 0, 3)], own), rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_refused():
    x, y, found, own = drawn([1], (2,))
    made = spans.add(x, y, found, [own[1]], writable=False).square().sum()
    with pytest.raises(RuntimeError, match="second order"):
        torch.autograd.grad(made, x, create_graph=True)


def test_a_high_rank_beside_low_ones_costs_only_its_own():
    x, y, found, own = drawn([1, 2, 3, 4], (1, 1, 1, 32))
    with FlopCounterMode(display=False) as counter:
        spans.add(x, y, found, [own[s.own] for s in found], writable=False).sum().backward()
    each = [2 * 3 * r * (IN + OUT) for r in (1, 1, 1, 32)]  # two flops a number, 3 rows
    assert counter.get_total_flops() == 3 * sum(each), "forward, gradients of factors, gradient of x"
