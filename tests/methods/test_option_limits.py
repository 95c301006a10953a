"""Options of methods, starts and optimisers: their defaults and their limits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support.options import METHODS, OPTIMISERS, STARTS
from torch import nn

import veneer
from veneer import methods, optim
from veneer.errors import ConfigError, ShapeError, VeneerError
from veneer.methods import inits
from veneer.sites import site_for

OUT, IN = 8, 12


def defaults(options: dict[str, Any]) -> dict[str, Any]:
    return {name: p.default for name, p in options.items() if name != "seed"}


@pytest.mark.parametrize("name", methods.available())
def test_defaults_of_a_method(name):
    own = methods.options_of(methods.get(name))
    assert defaults(own) == METHODS[name]
    assert "seed" not in own or own["seed"].default == 0


@pytest.mark.parametrize("name", inits.available())
def test_defaults_of_a_start(name):
    assert defaults(inits.options_of(name)) == STARTS.get(name, {})


@pytest.mark.parametrize("name", optim.available())
def test_defaults_of_an_optimiser(name):
    assert defaults(optim.options_of(name)) == OPTIMISERS[name]


ABOVE_0 = ([1e-9, 1e9], [0.0, -1.0])
FROM_0 = ([0.0, 1e-9], [-1e-9])
# (method, option): (values that fit, values that are refused), on a layer of 8 out and 12 in at rank 4.
LIMITS: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {
    ("adalora", "rank"): ([2, OUT], [1, OUT + 1]),  # at target 2
    ("adalora", "target"): ([1, 4], [0, 5]),
    ("adalora", "begin"): ([0.0, 0.69], [-0.1, 0.7]),
    ("adalora", "end"): ([0.0, 0.89], [-0.1, 0.9]),
    ("adalora", "every"): ([1, 2], [0]),
    ("adalora", "orthogonality"): FROM_0,
    ("bat", "rank"): ([1, 2, 4], [0, 3, 8]),
    ("boft", "block"): ([2, 3, 4, 6, 12], [0, 1, 5, 7, 24]),
    ("boft", "factors"): ([1], [0, -1]),
    ("bottleneck", "rank"): ([1, 1 << 10], [0, (1 << 20) + 1]),
    ("bottleneck", "placement"): (["houlsby", "pfeiffer"], ["serial"]),
    ("bottleneck", "activation"): (["relu", "gelu", "silu"], ["tanh"]),
    ("flora", "rank"): ([1, 40], [0, (1 << 20) + 1]),
    ("fourierft", "frequencies"): ([1, OUT * IN], [0, OUT * IN + 1]),
    ("fourierft", "rms"): ABOVE_0,
    ("fourierft", "scaling"): ABOVE_0,
    ("hra", "rank"): ([2, 8], [0, 3, 10]),
    ("lokr", "factor"): ([-1, 1, 2, 5], [0, -2]),
    ("loldu", "basis"): (["lu"], ["qr"]),
    ("miss", "rank"): ([1, IN], [0, IN + 1]),
    ("miss", "mini"): ([1, 4, OUT], [0, 3, OUT + 1]),
    ("oft", "block"): ([2, 3, IN], [1, 5, 2 * IN]),
    ("oft", "terms"): ([0, 2, 3], [1, -1]),
    ("shira", "numbers"): ([1, OUT * IN], [0, OUT * IN + 1]),
    ("shira", "rank"): ([1, 4], [0, 5]),  # five times (8 + 12) numbers are more than 8 * 12
    ("vera", "rank"): ([1, 40], [0, (1 << 20) + 1]),
    **{(n, "dropout"): ([0.0, 0.99], [-0.1, 1.0]) for n, own in METHODS.items() if "dropout" in own},
    **{(n, "alpha"): ABOVE_0 for n, own in METHODS.items() if "alpha" in own},
    **{
        (n, "rank"): ([1, OUT], [0, OUT + 1])
        for n in ("dora", "hira", "loha", "lokr", "loldu", "lora", "lorafa", "loraxs", "randlora")
    },
}
FIXED = {"adalora": {"target": 2}, "oft": {"block": 4}, "boft": {"block": 4}, "fourierft": {"frequencies": 5}}
LIMITS_OF_OPTIMISERS: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {
    ("balanced", "floor"): ([1e-9, 1.0], [0.0, 1.001]),
    ("galore", "rank"): ([1], [0]),
    ("galore", "period"): ([1], [0]),
    ("galore", "scale"): ABOVE_0,
    ("lora-muon", "damping"): FROM_0,
    ("loraplus", "ratio"): ABOVE_0,
    ("lorapro", "damping"): FROM_0,
    ("lorapro", "form"): (["factored", "full"], ["half"]),
    ("lorapro", "x"): (["sylvester"], ["silvester"]),
    ("scaled", "damping"): FROM_0,
}
LIMITS_OF_STARTS: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {
    ("orthogonal", "size"): ABOVE_0,
    ("loraga", "gamma"): ABOVE_0,
    ("loraga", "direction"): (["ArB2r", "A2rBr", "ArBr"], ["BrAr"]),
    ("gora", "gamma"): ABOVE_0,
    ("keeplora", "protected"): ([1e-9, 0.999], [0.0, 1.0]),
    ("corda", "mode"): (["instruction", "knowledge"], ["both"]),
}


def attached(method: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    known = methods.options_of(methods.get(method))
    own = {**({"rank": 4} if "rank" in known else {}), **FIXED.get(method, {})}
    return veneer.attach(nn.Sequential(nn.Linear(IN, OUT)), method, to=["0"], **{**own, **options})


def cells(limits: dict[tuple[str, str], tuple[list[Any], list[Any]]]) -> Any:
    """Returns (name, option, value, True if it fits) of every value."""
    rows = [
        (*key, v, fits)
        for key, (good, bad) in limits.items()
        for fits, vs in ((1, good), (0, bad))
        for v in vs
    ]
    return pytest.mark.parametrize(("name", "option", "value", "fits"), rows)


@cells(LIMITS)
def test_limits_of_a_method(name, option, value, fits):
    if fits:
        layer = attached(name, **{option: value})
        assert torch.isfinite(layer(torch.ones(2, IN))).all()
    else:
        with pytest.raises(VeneerError, match=option):
            attached(name, **{option: value})


@cells(LIMITS_OF_OPTIMISERS)
def test_limits_of_an_optimiser(name, option, value, fits):
    if fits:
        assert getattr(optim.make(name, **{option: value}), option) == value
    else:
        with pytest.raises(ConfigError, match=option):
            optim.make(name, **{option: value})


@cells(LIMITS_OF_STARTS)
def test_limits_of_a_start(name, option, value, fits):
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT))
    needs = inits.needs(name)
    stats = None
    if needs.data:
        x = torch.randn(40, IN, generator=draw)
        batches = [(x[i : i + 10], torch.ones(10, OUT)) for i in range(0, 40, 10)]
        loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
        stats = veneer.calibrate(model, batches, rank=2, loss=loss, inputs=True)
    options = {"rank": 2, "init": name, "init_options": {option: value}, "stats": stats}
    if fits:
        change = veneer.attach(model, "lora", to=["0"], **options)
        assert torch.isfinite(change(torch.ones(2, IN))).all()
    else:
        with pytest.raises(ConfigError, match=option):
            veneer.attach(model, "lora", to=["0"], **options)


FLOATS = [
    (make, name, option)
    for make, table in (("method", METHODS), ("start", STARTS), ("optimiser", OPTIMISERS))
    for name, own in table.items()
    for option, value in own.items()
    if isinstance(value, float) or option in ("alpha", "scaling")
]


@pytest.mark.parametrize(("kind", "name", "option"), FLOATS)
def test_an_infinite_option_is_refused_everywhere(kind, name, option):
    for value in (math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"{option} must be a finite number, got {value}"):
            if kind == "method":
                attached(name, **{option: value})
            elif kind == "start":
                attached("lora", init=name, init_options={option: value})
            else:
                optim.make(name, **{option: value})


@pytest.mark.parametrize(
    ("method", "options", "what"),
    [("oft", {}, "block 5"), ("boft", {}, "block 5"), ("boft", {"factors": 1, "block": 7}, "block 7")],
)
def test_the_side_that_a_block_must_divide_is_named(method, options, what):
    for layer, side in ((nn.Linear(12, 8), "in = 12"), (nn.Embedding(12, 8), "out = 8")):
        with pytest.raises(ShapeError, match=rf"^{what} does not divide {side} at"):
            methods.build(methods.get(method), site_for("0", layer), {"block": 5, **options})
    with pytest.raises(ShapeError, match=r"^block x 2\^1 = 16 does not divide in = 12 at"):
        methods.build(methods.get("boft"), site_for("0", nn.Linear(12, 8)), {"block": 8, "factors": 2})


def test_several_factors_of_butterflies_need_an_even_block():
    attached("boft", block=6, factors=2)
    for block, factors, said in ((3, 2, "even with several factors"), (4, 2, "does not divide in = 12")):
        with pytest.raises(VeneerError, match=said):
            attached("boft", block=block, factors=factors)


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError) as e:
        optim.make("galore", scale=math.inf, rang=3)
    assert str(e.value).splitlines() == [
        "optimiser 'galore' has no option 'rang'; did you mean 'rank'?",
        "scale must be a finite number, got inf",
    ]


def test_every_number_has_a_limit_here():
    """Numbers without limits: the size of a start, which may be 0 or of either sign."""
    free = {("prefix", "start"), ("vera", "start"), ("bottleneck", "scaling"), ("prefix", "length")}
    limited = {*LIMITS, *LIMITS_OF_OPTIMISERS, *LIMITS_OF_STARTS} | free
    numbers = {
        (name, option)
        for name, own in itertools.chain(METHODS.items(), STARTS.items(), OPTIMISERS.items())
        for option, value in own.items()
        if type(value) in (int, float)
    }
    assert numbers - limited == set()
