"""Random sums of adapters of every form against W' - W written out, while adapters come and go."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from veneer.adapt.banks.one_pass import one_pass_bank
from veneer.adapt.banks.program import Program
from veneer.adapt.banks.rows import Form
from veneer.adapt.banks.segments import SegmentBank
from veneer.adapt.banks.stacks import Layer, rank_class
from veneer.errors import ConfigError, NotMergeable, ShapeError
from veneer.methods import Factors, Products
from veneer.sites import find

OUT, IN = 5, 6


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, 4, bias=False)).double()


def draw(*shape, by):
    return torch.tensor([by.gauss(0, 1) for _ in range(torch.Size(shape).numel())]).double().view(shape)


def form(site, rank, parts, by):
    """A form with gains of outputs (g), of inputs (c) and products with W (p) as `parts` says.

    Changes by products have no low rank.
    """
    rank = 0 if parts in ("p", "gp") else rank
    return Form(
        Factors(
            draw(rank, site.in_, by=by),
            draw(site.out, rank, by=by),
            draw(site.out, by=by) if "g" in parts else None,
            draw(site.in_, by=by) if "c" in parts else None,
        ),
        Products(torch.ones(site.out).double(), draw(2, site.in_, by=by), draw(2, site.out, by=by))
        if "p" in parts
        else None,
    )


def change(W, f):
    """W' - W of a form, written out."""
    A, B, g, c = f.factors
    g = torch.ones(len(W)).double() if g is None else g
    c = torch.ones(W.shape[1]).double() if c is None else c
    D = g[:, None] * (W + B @ A) * c - W
    for a, b in zip(*f.products[1:], strict=True) if f.products else ():
        D = D + b[:, None] * W * a
    return D


def expected(model, x, rows, forms):
    start = 0
    out = []
    for terms, n in rows:
        h = x[start : start + n]
        for name, layer in enumerate(model):
            W = layer.weight.detach() + sum(
                s * change(layer.weight.detach(), forms[who][f"{name}"][1])
                for who, s in terms
                if f"{name}" in forms[who]
            )
            h = h @ W.T + (0 if layer.bias is None else layer.bias.detach())
        out.append(h)
        start += n
    return torch.cat(out)


KINDS = ["", "g", "c", "gc", "p", "gp"]


@pytest.mark.parametrize("seed", range(12))
def test_every_row_has_its_own_sum_while_adapters_come_and_go(seed):
    by = random.Random(seed)
    model = layers()
    sites = {site.name: site for site in find(model, "all-linear")}
    usual = seed % 2 == 0  # or a bank with a kernel, which is never large enough for it
    bank = SegmentBank(model) if usual else one_pass_bank(model, (10**9, 10**9))
    forms, placed = {}, {}
    for step in range(6):
        for who in [w for w in placed if by.random() < 0.4]:
            bank.drop(placed.pop(who))
        for k in range(by.randint(1, 4)):
            who = f"{step} {k}"
            at = by.choice([["0"], ["1"], ["0", "1"]])
            forms[who] = {
                n: (sites[n], form(sites[n], by.choice([0, 1, 2, 3]), by.choice(KINDS), by)) for n in at
            }
            placed[who], finite = bank.put(forms[who])
            assert finite
        rows = [
            (
                tuple((w, by.choice([1.0, 1.0, -0.5, 2.0])) for w in by.sample(list(placed), n)),
                by.randint(0, 3),
            )
            for n in (min(by.choice([0, 1, 1, 1, 2, 3]), len(placed)) for _ in range(6))
        ]
        rows = sorted(rows, key=lambda row: [placed[w][:2] for w, _ in row[0]])
        total = sum(n for _, n in rows)
        if not total:
            continue
        bank.use([(tuple((placed[w], s) for w, s in terms), n) for terms, n in rows])
        x = draw(total, IN, by=by)
        y = expected(model_of(model), x, rows, forms)
        for shaped in (x, x[None], x[:, None]):
            with torch.no_grad():
                found = model(shaped).reshape(total, -1)
            torch.testing.assert_close(found, y, rtol=1e-9, atol=1e-9)
    bank.close()
    assert not bank.layers and not bank.stacks and not bank.programs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def model_of(model):
    return [model[0], model[1]]


@pytest.mark.parametrize(
    ("rank", "wanted"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (16, 16), (17, 32)]
)
def test_stacks_have_ranks_of_powers_of_two(rank, wanted):
    assert rank_class(rank) == wanted


def test_sixteen_adapters_share_a_stack_and_a_freed_place_is_taken_again():
    model, by = layers(), random.Random(0)
    (site, _) = find(model, "all-linear")
    bank = SegmentBank(model)
    placed = [bank.put({"0": (site, form(site, 3, "", by))})[0] for _ in range(18)]
    assert [p[:2] for p in placed] == [(0, i) for i in range(16)] + [(1, 0), (1, 1)]
    assert bank.put({"0": (site, form(site, 2, "", by))})[0][:2] == (2, 0)
    bank.drop(placed[5])
    bank.drop(placed[3])
    assert bank.put({"0": (site, form(site, 4, "", by))})[0][:2] == (0, 3)
    for p in placed[16:]:
        bank.drop(p)
    assert sorted(bank.stacks) == [0, 2]
    assert bank.put({"0": (site, form(site, 8, "", by))})[0][:2] == (3, 0)


@pytest.mark.parametrize("spoiled", ["A", "B", "g", "c", "a", "b", None])
@pytest.mark.parametrize("layer", ["0", "1"])
def test_a_number_that_is_not_finite_is_told_of(spoiled, layer):
    by = random.Random(1)
    sites = {site.name: site for site in find(layers(), "all-linear")}
    forms = {n: (site, form(site, 2, "gcp", by)) for n, site in sites.items()}
    f = forms[layer][1]
    part = {"a": f.products and f.products.a, "b": f.products and f.products.b, **f.factors._asdict()}
    if spoiled:
        part[spoiled].view(-1)[-1] = torch.inf
    placed, finite = SegmentBank(layers()).put(forms)
    assert finite is (spoiled is None)
    assert (placed.gains, placed.scales, placed.multiplies) == (True, True, True)


@pytest.mark.parametrize("parts", ["g", "c", "p"])
def test_parts_of_a_single_layer_are_noted(parts):
    by = random.Random(2)
    first, second = find(layers(), "all-linear")
    for order in ((first, second), (second, first)):
        forms = {s.name: (s, form(s, 1, p, by)) for s, p in zip(order, (parts, ""), strict=True)}
        placed, _ = SegmentBank(layers()).put(forms)
        assert (placed.gains, placed.scales, placed.multiplies) == tuple(p == parts for p in "gcp")


def test_batches_of_layers_that_see_fewer_rows():
    model, by = layers(), random.Random(3)
    (site, _) = find(model, "all-linear")
    bank, forms = SegmentBank(model), {"w": {"0": (site, form(site, 2, "g", by))}}
    terms = ((bank.put(forms["w"])[0], 1.0),)
    bank.use([(terms, 4)], [(terms, 1), ((), 1)])
    x = draw(4, IN, by=by)
    with torch.no_grad():
        for n, rows in ((4, [((("w", 1.0),), 4)]), (2, [((("w", 1.0),), 1), ((), 1)])):
            torch.testing.assert_close(model(x[:n]), expected(model_of(model), x[:n], rows, forms))
    with pytest.raises(ShapeError, match=r"'0' was called with 3 rows, the batch has 4 or 2; call use\(\)"):
        model(x[:3])
    bank.use([((), 4)], [((), 2)])
    assert bank.programs == ()
    bank.use([((), 4)], [(terms, 2)])
    assert len(bank.programs) == 2
    with pytest.raises(NotMergeable, match="a bank holds many adapters"):
        bank.layers["0"].delta(site)
    with pytest.raises(ConfigError, match="an adapter called 'bank' is already attached"):
        SegmentBank(model)


def test_inputs_get_a_hook_with_the_first_adapter_that_scales_them():
    model, by = layers(), random.Random(7)
    (site, _) = find(model, "all-linear")
    bank, hooks = SegmentBank(model), []
    for parts in ("", "g", "p", "c", "gc", ""):
        bank.put({"0": (site, form(site, 1, parts, by))})
        hooks.append((len(model[0]._forward_pre_hooks), len(model[0]._forward_hooks)))
    assert hooks == [(0, 1)] * 3 + [(1, 1)] * 3
    with pytest.raises(ConfigError, match=r"must not be torch\.compile's wrapper"):
        SegmentBank(torch.compile(layers(), backend="eager"))


def test_outputs_that_others_keep_are_not_written():
    """A hook in front keeps the base's output; an output that is not contiguous is copied."""
    model, by = layers(), random.Random(4)
    (site, _) = find(model, "all-linear")
    kept = []
    handle = model[0].register_forward_hook(lambda m, a, y: kept.append((y, y.clone())))
    bank, forms = SegmentBank(model), {"w": {"0": (site, form(site, 2, "g", by))}}
    bank.use([(((bank.put(forms["w"])[0], 1.0),), 3)])
    with torch.no_grad():
        model(draw(3, IN, by=by))
    assert torch.equal(*kept[0])
    handle.remove()
    y = draw(4, 3, OUT, by=by).mT.mT.transpose(0, 1)
    x = draw(3, 4, IN, by=by)
    bank.use([(((bank.put(forms["w"])[0], 1.0),), 12)])
    found = bank.layers["0"].onto(x, y, site, writable=True)
    own = y.reshape(12, -1) - model[0].bias.detach()
    A, B, g, _ = forms["w"]["0"][1].factors
    wanted = y.reshape(12, -1) + (g - 1) * own + x.reshape(12, -1) @ A.T @ (g[:, None] * B).T
    torch.testing.assert_close(found.reshape(12, -1), wanted)


def test_programs_say_what_they_hold():
    by = random.Random(5)
    (site, _) = find(layers(), "all-linear")
    bank = SegmentBank(layers())
    low, gains, scales, many = (bank.put({"0": (site, form(site, 2, p, by))})[0] for p in ("", "g", "c", "p"))
    like = torch.zeros(1)

    def program(*terms):
        return Program([(t, 2) for t in terms], like)

    assert program(((low, 1.0),), ()).is_plain and not program(((low, 1.0),)).is_idle
    assert program((), ()).is_idle and not program((), ()).is_plain
    for odd in (gains, scales, many):
        assert not program(((low, 1.0),), ((odd, 1.0),)).is_plain
        assert not program(((odd, 1.0),)).is_idle
        assert not program(((odd, 0.5),)).is_idle
    both = program(((low, 1.0), (low, 2.0)))
    assert not both.is_plain and not both.is_idle
    nobody = Program([(((low, 1.0),), 0), ((), 2)], like)
    assert nobody.is_idle and not nobody.is_plain
    for terms, apart in (
        (((low, 1.0), (low, 2.0)), 0),
        (((gains, 0.5),), 0),
        (((scales, 1.0),), 0),
        (((scales, 0.5),), 1),
        (((many, 1.0),), 1),
        (((low, 1.0), (gains, 1.0)), 1),
        (((low, 1.0), (scales, 1.0)), 1),
    ):
        assert len(program(terms).apart) == apart
    assert program(((scales, 1.0),)).scales and not program(((scales, 0.5),)).scales
    plain = Program([(((low, 0.5),), 2), ((), 3), (((low, 1.0),), 0), (((low, 2.0),), 1)], like)
    assert [(start, s.rows, s.strength) for start, s in plain.segments] == [(0, 2, 0.5), (5, 1, 2.0)]
    found = program(((low, 1.0),), (), ((low, 1.0),)).groups(torch.device("cpu"))
    assert [(terms, index.tolist()) for terms, index in found] == [
        (((low, 1.0),), [0, 1, 4, 5]),
        ((), [2, 3]),
    ]
    assert program(((low, 1.0),), ((low, 1.0),)).groups(torch.device("cpu")) == [(((low, 1.0),), None)]


def test_places_without_an_adapter_cost_nothing_and_hold_nothing():
    by = random.Random(6)
    (site, _) = find(layers(), "all-linear")
    layer = Layer(site, 4)
    assert layer.factors(0, 16) is None
    assert layer.write(2, form(site, 3, "gc", by)) and layer.write(5, form(site, 0, "p", by))
    assert layer.factors(0, 2) is None and layer.factors(3, 13) is None
    A, B = layer.factors(0, 16)
    assert A.shape == (16, 3, IN) and B.shape == (16, 3, OUT)
    layer.clear(2)
    assert layer.factors(2, 1) is None
    layer.clear(5)
    assert layer.factors(0, 16) is None and not layer.products
    assert not layer.A.any() and not layer.B.any() and not layer.excess.any() and bool((layer.c == 1).all())
