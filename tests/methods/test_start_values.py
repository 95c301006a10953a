"""Numbers that every method starts with, the ones it saves, its draws, and its dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cells import built
from support.options import METHODS
from torch import Tensor, nn

from veneer import methods
from veneer.methods.lora import LoRA
from veneer.ops.draws import keyed
from veneer.sites import site_for

OUT, IN = 96, 150
# Options of a change of one linear layer, for each method that has such.
SMALL: dict[str, dict[str, Any]] = {
    **{n: {"rank": 6} for n, own in METHODS.items() if "rank" in own},
    "adalora": {"rank": 6, "target": 3},
    "boft": {"block": 6},
    "dense": {},
    "fourierft": {"frequencies": 40},
    "ia3": {},
    "oft": {"block": 6},
}


def started(method: str, *, layer: nn.Module | None = None, name: str = "0", **options: Any) -> Any:
    torch.manual_seed(0)
    site = site_for(name, nn.Linear(IN, OUT) if layer is None else layer)
    return methods.build(methods.get(method), site, {**SMALL[method], **options})


ZERO, ONE = ("all", 0.0), ("all", 1.0)
# (method, options, parameter): shape, and the number everywhere, the end of an even draw, or the deviation of
# a normal one.
STARTS: list[tuple[str, dict[str, Any], dict[str, tuple[tuple[int, ...], tuple[str, float]]]]] = [
    (
        "adalora",
        {},
        {"A": ((6, IN), ("normal", 0.02)), "B": ((OUT, 6), ("normal", 0.02)), "E": ((6, 1), ZERO)},
    ),
    ("bat", {}, {"B": ((16, 6, 6), ZERO)}),
    ("boft", {"factors": 1}, {"P": ((1, 25, 6, 6), ZERO), "s": ((OUT,), ONE)}),
    (
        "bottleneck",
        {"rank": 40},
        {
            "D": ((40, OUT), ("even", OUT**-0.5)),
            "a": ((40,), ZERO),
            "U": ((OUT, 40), ZERO),
            "u": ((OUT,), ZERO),
        },
    ),
    ("dense", {}, {"D": ((OUT, IN), ZERO)}),
    ("fourierft", {}, {"c": ((40,), ZERO)}),
    ("hira", {}, {"A": ((6, IN), ("even", IN**-0.5)), "B": ((OUT, 6), ZERO)}),
    ("hra", {"rank": 18}, {"U": ((IN, 18), ("even", 1 / 3))}),
    ("ia3", {}, {"l": ((OUT,), ONE)}),
    ("ia3", {"feedforward": ("0",)}, {"l": ((IN,), ONE)}),
    (
        "loha",
        {"rank": 9},
        {
            "A1": ((9, IN), ("even", IN**-0.5)),
            "B1": ((OUT, 9), ("even", 1 / 3)),
            "A2": ((9, IN), ZERO),
            "B2": ((OUT, 9), ("even", 1 / 3)),
        },
    ),
    (  # out = 48 * 2 and in = 10 * 15; products where the rank is below half of a longer side
        "lokr",
        {"factor": 48, "both": True, "rank": 4},
        {
            "Lb": ((48, 4), ("even", 0.5)),
            "La": ((4, 10), ("even", 10**-0.5)),
            "A": ((4, 15), ("even", 15**-0.5)),
            "B": ((2, 4), ZERO),
        },
    ),
    (
        "lokr",
        {"factor": 2, "both": True, "rank": 4},
        {"L": ((2, 2), ("even", 2**-0.5)), "A": ((4, 75), ("even", 75**-0.5)), "B": ((48, 4), ZERO)},
    ),
    ("lora", {}, {"A": ((6, IN), ("even", IN**-0.5)), "B": ((OUT, 6), ZERO)}),
    ("lorafa", {}, {"B": ((OUT, 6), ZERO)}),
    ("loraxs", {}, {"R": ((6, 6), ZERO)}),
    ("miss", {}, {"D": ((OUT, 6), ZERO)}),
    ("miss", {"mini": 12}, {"D": ((12, 6), ZERO)}),
    ("oft", {}, {"Q": ((25, 15), ZERO)}),
    ("oft", {"shared": True}, {"Q": ((1, 15), ZERO)}),
    ("randlora", {}, {"l": ((6, 16), ZERO), "g": ((16, OUT), ("all", 1 / OUT))}),
    ("randlora", {"rank": 7}, {"l": ((7, 14), ZERO), "g": ((14, OUT), ("all", 1 / OUT))}),
    ("shira", {}, {"v": ((6 * (OUT + IN),), ZERO)}),
    ("shira", {"numbers": 5}, {"v": ((5,), ZERO)}),
    ("vera", {}, {"b": ((OUT,), ZERO), "d": ((6,), ("all", 0.1))}),
    ("vera", {"start": 0.3}, {"d": ((6,), ("all", 0.3)), "b": ((OUT,), ZERO)}),
]


def assert_drawn(t: Tensor, kind: str, size: float) -> None:
    """Five standard errors; an even draw also ends near its ends."""
    if kind == "all":
        assert torch.equal(t, torch.full_like(t, size))
        return
    spread = size / 3**0.5 if kind == "even" else size
    error = 5 * spread / t.numel() ** 0.5
    assert abs(float(t.mean())) < error and float(t.std()) == pytest.approx(spread, abs=error)
    if kind == "even":
        assert 1 - 20 / t.numel() < float(t.abs().max()) / size <= 1


@pytest.mark.parametrize(("method", "options", "expected"), STARTS)
def test_numbers_of_a_start(method, options, expected):
    delta = started(method, **options)
    found = dict(delta.named_parameters())
    assert set(found) == set(expected)
    for name, (shape, drawn) in expected.items():
        assert found[name].shape == shape, name
        if shape != (2, 2):  # too few to tell
            assert_drawn(found[name].detach(), *drawn)


def test_every_method_of_one_layer_has_a_row():
    drawn_otherwise = {"dora", "flora", "loldu"}
    assert {row[0] for row in STARTS} | drawn_otherwise == {*SMALL}


@pytest.mark.parametrize(
    ("method", "ids"), [("hira", "B"), ("lora", "B"), ("lorafa", "A")]
)  # an A of zeros takes no gradient through a B of zeros
def test_token_ids_start_with_zeros_on_the_other_side(method, ids):
    delta = started(method, layer=nn.Embedding(IN, OUT))
    zero = delta.get_parameter("A" if ids == "B" else "B")
    drawn = delta.get_parameter("B") if ids == "B" else delta.A
    assert not zero.any()
    assert_drawn(drawn.detach(), "normal", 1.0)


def test_a_start_of_token_ids_that_is_drawn_stays():
    layer = nn.Embedding(IN, OUT)
    frozen, trained = (started(n, layer=layer, init="pissa") for n in ("lorafa", "lora"))
    assert torch.equal(frozen.A, trained.A) and not frozen.B.any()


DRAWS = [
    ("bottleneck", "D", (6, OUT), OUT),
    ("hira", "A", (6, IN), IN),
    ("loha", "B1", (OUT, 6), 6),
    ("lokr", "L", (8, 10), 10),
    ("lora", "A", (6, IN), IN),
]


@pytest.mark.parametrize(("method", "name", "shape", "inputs"), DRAWS)
def test_a_seed_gives_the_same_start_in_every_version(method, name, shape, inputs):
    """The numbers u of the generator of seed and name, in [0, 1), stand for (2 u - 1) / sqrt(inputs)."""
    u = torch.rand(shape, generator=keyed(3, site_for("0", nn.Linear(IN, OUT)).key))
    found = started(method, seed=3).get_parameter(name)
    torch.testing.assert_close(found.detach(), (2 * u - 1) / inputs**0.5)


def test_held_numbers_of_shira_are_at_their_places():
    site, places, v = site_for("0", nn.Linear(5, 4)), torch.tensor([7, 0, 19]), torch.tensor([1.0, 2.0, 3.0])
    D = torch.zeros(4, 5)
    D[1, 2], D[0, 0], D[3, 4] = v
    assert torch.equal(methods.get("shira").holding(site, places, v).delta(site), D)


@pytest.mark.parametrize("stabilised", [True, False])
def test_a_held_pair_has_the_scale_of_its_own_rank(stabilised):
    site, A, B = site_for("0", nn.Linear(5, 4)), torch.randn(4, 5), torch.randn(4, 4)
    delta = LoRA.holding(site, A, B, alpha=6.0, stabilised=stabilised)
    s = 3.0 if stabilised else 1.5
    assert delta.taken() is None and delta.dropout == 0.0 and delta.stabilised == stabilised
    assert delta.options == {"rank": 4, "alpha": 6.0, "stabilised": stabilised, "dropout": 0.0}
    torch.testing.assert_close(delta.delta(site), s * B @ A)
    half = LoRA.holding(site, A, B, alpha=6.0, stabilised=stabilised, start=2, dropout=0.5)
    torch.testing.assert_close(half.delta(site), s * B @ A)  # the same product, half of it a start
    assert half.A.shape == (2, 5) and half.scaling == s and half.dropout == 0.5
    torch.testing.assert_close(half.taken().B @ half.taken().A, s * B[:, 2:] @ (A[:2] - A[2:]))
    assert half.alpha == pytest.approx(s * (2**0.5 if stabilised else 2))
    assert not LoRA.holding(site, A, B, alpha=6.0).stabilised


def test_hra_starts_in_pairs_and_loldu_with_its_scale():
    U = started("hra").U
    assert torch.equal(U[:, 0::2], U[:, 1::2]) and not torch.equal(U[:, 0], U[:, 2])
    delta = started("loldu", alpha=3.0)
    assert delta.sigma.item() == delta.sigma0.item() == 0.5 and torch.equal(delta.z, delta.z0)
    assert started("loldu").sigma.item() == 1.0


def test_further_ranks_of_flora_start_with_signs():
    delta = started("flora", rank=3)
    A, B = delta.A.detach(), delta.B.detach()
    assert torch.equal(A[0], torch.ones(IN)) and torch.equal(A[1:].abs(), torch.ones(2, IN))
    assert abs(float(A[1:].mean())) < 0.3 and not torch.equal(A[1], A[2])
    assert torch.equal(B, torch.tensor([1.0, 0.0, 0.0]).expand(OUT, 3))


@pytest.mark.parametrize("init", ["kaiming", "pissa", "gaussian"])
@pytest.mark.parametrize("layer", [nn.Linear(IN, OUT), nn.Embedding(IN, OUT)])
def test_dora_starts_with_the_norms_of_rows(layer, init):
    delta = started("dora", layer=layer, init=init)
    W = layer.weight if isinstance(layer, nn.Linear) else layer.weight.mT
    torch.testing.assert_close(delta.m, W.detach().norm(dim=1))
    assert len(delta.m) == OUT and delta.lora.A.shape == (6, IN)


# -- what is saved, precision and draws ----------------------------------------------------------------------

SAVED = {
    "adalora": "A E B mean_A spread_A mean_E spread_E mean_B spread_B steps",
    "bat": "B",
    "boft": "P s",
    "bottleneck": "D a U u",
    "dense": "D",
    "dora": "m lora.A lora.B",
    "flora": "A B",
    "fourierft": "c rows columns",
    "hira": "A B",
    "hra": "U",
    "ia3": "l",
    "loha": "A1 B1 A2 B2",
    "lokr": "L A B",
    "loldu": "z sigma L U z0 sigma0",
    "lora": "A B",
    "lorafa": "A B",
    "loraxs": "R A L",
    "miss": "D",
    "oft": "Q",
    "randlora": "l g A B",
    "shira": "v places",
    "vera": "b d A B",
}


@pytest.mark.parametrize("method", SAVED)
def test_numbers_that_are_saved(method):
    assert set(started(method).state_dict()) == set(SAVED[method].split())


def test_the_grid_saves_its_frequencies_and_not_its_waves():
    assert set(started("fourierft", grid=True).state_dict()) == {"c", "rows", "columns"}
    assert set(started("lora", init="pissa").state_dict()) == {"A", "B", "A0", "B0"}


@pytest.mark.parametrize("method", SAVED)
def test_numbers_are_in_float32_at_least(method):
    for dtype, own in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        delta = started(method, layer=nn.Linear(IN, OUT, dtype=dtype))
        assert {t.dtype for t in delta.state_dict().values() if t.is_floating_point()} == {own}
    delta = started(method, layer=nn.Linear(IN, OUT, dtype=torch.float64))
    assert {t.dtype for t in delta.state_dict().values() if t.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize("method", SAVED)
def test_a_layer_without_numbers_gives_a_change_without_numbers(method):
    """Counts of parameters are taken on the device meta."""
    found = dict(started(method, layer=nn.Linear(IN, OUT, device="meta")).named_parameters())
    assert {n: t.shape for n, t in found.items()} == {
        n: t.shape for n, t in started(method).named_parameters()
    }
    assert all(t.is_meta for t in found.values())


DRAWN = {
    **dict.fromkeys(
        ["adalora", "bottleneck", "dora", "hira", "hra", "loha", "lokr", "lora", "lorafa", "shira"]
    ),
    "flora": {"rank": 2},
    "fourierft": {"grid": True},
}
OF_ALL_LAYERS = ("fourierft", "randlora", "vera")


@pytest.mark.parametrize("method", [*DRAWN, *OF_ALL_LAYERS])
def test_draws_depend_on_the_seed_and_the_layers_name(method):
    options = DRAWN.get(method) or {}

    def drawn(**given: Any) -> dict[str, Tensor]:
        return started(method, **options, **given).state_dict()

    first = drawn()
    assert all(torch.equal(t, first[n]) for n, t in drawn(seed=0).items())
    assert not all(torch.equal(t, first[n]) for n, t in drawn(seed=1).items())
    alike = all(torch.equal(t, first[n]) for n, t in drawn(name="1").items())
    assert alike == (method in OF_ALL_LAYERS)


# -- dropout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [n for n in SMALL if "dropout" in METHODS[n]])
def test_dropout_thins_the_input_in_training_alone(method):
    site, delta = built(method, nn.Linear(12, 8).double(), {**SMALL[method], "rank": 3, "dropout": 0.5})
    x = torch.randn(5, 12, dtype=torch.float64)
    y = site.module(x).detach()
    whole = delta.eval()(x, y, site)
    assert torch.equal(whole, delta(x, y, site))
    delta.train()
    torch.manual_seed(3)
    found = delta(x, y, site)
    torch.manual_seed(3)
    thin, x_or_y = (x, y), 1 if method == "bottleneck" else 0
    dropped = nn.functional.dropout(thin[x_or_y], 0.5)
    given = (dropped, y) if x_or_y == 0 else (x, dropped)
    torch.testing.assert_close(found, delta.eval()(*given, site))
    assert not torch.allclose(found, whole)
