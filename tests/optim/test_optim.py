"""Rates and weight decay by role, against AdamW and decoupled decay written out by hand in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support import models
from torch import Tensor, nn

import veneer
from veneer import optim
from veneer.errors import ConfigError
from veneer.methods import DenseDelta
from veneer.optim.base import groups
from veneer.train import rates
from veneer.train.loop import schedule

BENCH = Path(__file__).parents[2] / "bench" / "results"
RATE, DECAY, RATIO = 0.03, 0.2, 16.0


def parts(method: str = "lora", to: list[str] | str = "all-linear", **options: object) -> list[groups.Part]:
    return groups.of_adapter(veneer.attach(models.llama(), method, to=to, rank=2, **options), "default")


def rates_by_name(found: list[groups.Part], optimiser: torch.optim.Optimizer) -> dict[str, float]:
    names = {id(p.parameter): p.name for p in found}
    return {names[id(p)]: g["lr"] for g in optimiser.param_groups for p in g["params"]}


def loraplus(found: list[groups.Part], ratio: float = RATIO, **given: object) -> torch.optim.Optimizer:
    return optim.make("loraplus", ratio=ratio).build(optim.Trained(found, **given))


def test_every_trained_parameter_is_in_one_group_and_nothing_else_is():
    model = veneer.attach(models.llama(), "dora", rank=2)
    found = groups.of_adapter(model, "default")
    grouped = [p for g in groups.adamw(found, {}).param_groups for p in g["params"]]
    assert sorted(map(id, grouped)) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_roles_come_from_the_method():
    roles = {p.name.split(".self_attn.q_proj.")[-1]: p.role for p in parts("dora") if "q_proj" in p.name}
    assert roles == {"lora.A": "A", "lora.B": "B", "m": "magnitude"}


def test_loraplus_multiplies_the_rate_of_B_alone():
    found = parts("dora")
    optimiser = loraplus(found)
    groups.set_rates(optimiser, RATE, 0.0)
    assert rates_by_name(found, optimiser) == {p.name: RATE * RATIO if p.role == "B" else RATE for p in found}


def test_without_a_rate_of_their_own_embeddings_have_that_of_the_others():
    found = parts(to=["embed_tokens", "q_proj"])
    assert any(p.embedding for p in found)
    for made in (groups.by_rate(found, {}), groups.adamw(found, {}).param_groups):
        assert [(g["scale"], g["base"]) for g in made] == [(1.0, 1.0)] * len(made)


@pytest.mark.parametrize("role", ["direction", "gain"])
def test_matrices_of_some_roles_do_not_decay(role):
    found = [groups.Part(one, nn.Parameter(torch.ones(4, 3)), one) for one in (role, "matrix")]
    assert groups.decay_shares(found) == [0.0, 1.0]


def test_embeddings_have_a_rate_of_their_own_and_no_ratio():
    found = parts(to=["embed_tokens", "q_proj"])
    optimiser = loraplus(found, embedding=0.1)
    groups.set_rates(optimiser, RATE, 0.0)
    own = rates_by_name(found, optimiser)
    assert {own["model.embed_tokens.A"], own["model.embed_tokens.B"]} == {0.1 * RATE}
    assert own["model.layers.0.self_attn.q_proj.B"] == RATIO * RATE


def test_of_the_base_every_parameter_once_tied_or_not():
    model = models.llama(tie_word_embeddings=True)
    found = groups.of_base(model)
    assert [p.name for p in found] == [n for n, _ in model.named_parameters()]
    assert {p.name: p.embedding for p in found if p.embedding} == {"model.embed_tokens.weight": True}
    assert {p.role for p in found if "norm" in p.name} == {"vector"}


class Nothing(DenseDelta):
    """A change without parameters."""

    def __init__(self, site):
        super().__init__()

    def delta(self, site):
        return torch.zeros_like(site.weight())


def test_nothing_to_train_is_refused():
    model = veneer.attach(models.llama(), Nothing)
    with pytest.raises(ConfigError) as e:
        groups.of_adapter(model, "default")
    assert (
        str(e.value) == "nothing to train: no parameter requires a gradient; choose a method with"
        " parameters, or other layers"
    )
    frozen = models.llama().requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        groups.of_base(frozen)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ConfigError, match=r"unknown optimiser 'adam'; did you mean 'adamw'\?"):
        optim.make("adam")


def test_options_are_the_optimisers_own():
    with pytest.raises(ConfigError) as e:
        optim.make("loraplus", ration=2.0, damping=1.0)
    told = (
        "optimiser 'loraplus' has no option 'ration'; did you mean 'ratio'?\noptimiser"
        " 'loraplus' has no option 'damping'; known: ratio"
    )
    assert str(e.value) == told


def test_options_have_types_and_not_the_names_of_types():
    """Flags and checks of files are made from them."""
    assert {n: (p.annotation, p.default) for n, p in optim.options_of("loraplus").items()} == {
        "ratio": (float, 16.0)
    }
    assert {n: p.annotation for n, p in optim.options_of("galore").items()} == {
        "rank": int,
        "period": int,
        "scale": float,
        "adam": bool,
    }


def test_the_built_in_models_rates_are_those_that_were_measured():
    rows = json.loads((BENCH / "optimiser_rates.json").read_text())["rows"]
    swept = {row["optimiser"]: [r for r in rows if r["optimiser"] == row["optimiser"]] for row in rows}
    assert {"adamw", "scaled", "balanced", "lora-muon", "lorapro", "lorapro-full", "lorapro-sgd"} == set(
        swept
    )
    for name in swept.keys() - {"lorapro-full"}:  # which has the factored form's
        best = min(swept[name], key=lambda row: row["valid"])
        assert rates.default("lora", name, True) == best["rate"] and best["valid"] < best["before"]


def test_where_no_rate_is_known_it_is_asked_for():
    with pytest.raises(ConfigError) as e:
        rates.default("lora", "scaled", False)
    assert str(e.value).startswith("no rate is known for 'scaled' on this model; give lr")
    assert rates.default("lora", "lorapro", False) == 2e-5


def adamw_by_hand(p: Tensor, gradients: list[Tensor], rates: list[float], kept: list[float]) -> Tensor:
    """Loshchilov & Hutter 2019, algorithm 2, with the decay of each step given as a factor."""
    m, v, p = torch.zeros_like(p), torch.zeros_like(p), p.clone()
    for t, (g, rate, factor) in enumerate(zip(gradients, rates, kept, strict=True), 1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        p = factor * p - rate * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    return p


def test_steps_are_adamws_with_the_decay_shared_by_the_factors():
    draw = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 5), "B": (4, 2), "matrix": (3, 3), "vector": (4,)}
    found = [
        groups.Part(role, nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64)), role)
        for role, s in shapes.items()
    ]
    start = {p.role: p.parameter.detach().clone() for p in found}
    optimiser = loraplus(found, betas=(0.8, 0.95))
    steps = [RATE, RATE / 2, RATE / 7]
    gradients: dict[str, list[Tensor]] = {p.role: [] for p in found}
    for rate in steps:
        for p in found:
            p.parameter.grad = torch.randn(p.parameter.shape, generator=draw, dtype=torch.float64)
            gradients[p.role].append(p.parameter.grad.clone())
        groups.set_rates(optimiser, rate, DECAY)
        optimiser.step()
    share = {"A": 0.5, "B": 0.5, "matrix": 1.0, "vector": 0.0}
    for p in found:
        own = [r * (RATIO if p.role == "B" else 1) for r in steps]
        expected = adamw_by_hand(
            start[p.role], gradients[p.role], own, [(1 - r * DECAY) ** share[p.role] for r in steps]
        )
        torch.testing.assert_close(p.parameter.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ratio", [1.0, RATIO])
def test_without_a_gradient_the_product_decays_as_a_whole_matrix_would(ratio):
    A, B = (nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((2, 5), (4, 2)))
    before = (B @ A).detach()
    optimiser = loraplus([groups.Part("A", A, "A"), groups.Part("B", B, "B")], ratio)
    for p in (A, B):
        p.grad = torch.zeros_like(p)
    groups.set_rates(optimiser, RATE, DECAY)
    optimiser.step()
    torch.testing.assert_close((B @ A).detach(), (1 - RATE * DECAY) * before, rtol=1e-12, atol=0)


def test_what_changes_an_embedding_decays_by_the_rate_that_it_has():
    A, B, table = (nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((2, 5), (4, 2), (5, 4)))
    product, before = (B @ A).detach(), table.detach().clone()
    found = [
        groups.Part("A", A, "A", True),
        groups.Part("B", B, "B", True),
        groups.Part("table", table, "matrix", True),
    ]
    optimiser = loraplus(found, embedding=0.1)
    for p in (A, B, table):
        p.grad = torch.zeros_like(p)
    groups.set_rates(optimiser, RATE, DECAY)
    optimiser.step()
    kept = 1 - 0.1 * RATE * DECAY
    torch.testing.assert_close((B @ A).detach(), kept * product, rtol=1e-12, atol=0)
    torch.testing.assert_close(table.detach(), kept * before, rtol=1e-12, atol=0)


def test_a_rate_of_zero_changes_nothing():
    p = nn.Parameter(torch.ones(2, 2))
    optimiser = groups.adamw([groups.Part("p", p, "matrix")], {})
    p.grad = torch.ones_like(p)
    groups.set_rates(optimiser, 0.0, DECAY)
    optimiser.step()
    assert p.detach().eq(1).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_schedules_by_hand(shape, expected):
    assert [schedule.share(step, 6, 2, shape) for step in range(6)] == pytest.approx(expected, abs=1e-15)


def test_adapters_start_from_about_ten_times_the_rate_of_full_fine_tuning():
    for builtin, times in (
        (True, 25 / 3),
        (False, 10),
    ):  # what the sweep found for the built-in model; the habit
        full = rates.default("full", "adamw", builtin)
        assert (
            rates.default("lora", "adamw", builtin)
            == rates.default("dora", "adamw", builtin)
            == pytest.approx(times * full)
        )
        assert full < rates.default("lora", "loraplus", builtin) < 10 * full


def test_methods_of_other_numbers_have_the_rates_that_a_sweep_chose():
    sweep = json.loads((Path(__file__).parents[2] / "bench/results/method_rates.json").read_text())
    best = {}
    for row in sweep["rows"]:
        best[row["method"]] = min(best.get(row["method"], row), row, key=lambda r: r["after"])
    assert set(rates.OWN_BUILTIN) | {"lora"} == set(best)
    for method, row in best.items():
        assert rates.default(method, "adamw", True) == pytest.approx(row["rate"])
        assert row["after"] < row["before"] - 0.02  # it has learned something
    assert all(rates.borrowed(m, rates.default(m, "adamw", True)) == "" for m in (*best, "dora", "full"))
    with pytest.raises(
        ConfigError, match=r"no rate is known for method 'vera' and optimiser 'adamw' on this model; give lr"
    ):
        rates.default("vera", "adamw", False)


def test_a_rate_that_was_not_measured_is_marked():
    for builtin in (True, False):
        lr = rates.default("nil", "adamw", builtin)
        assert lr == rates.default("lora", "adamw", builtin)
        told = " (LoRA's: none was measured for 'nil'; try others with --lr, by factors of 4)"
        assert rates.borrowed("nil", lr) == told
        assert rates.borrowed("nil", 3 * lr) == ""  # given by hand


@pytest.mark.parametrize("name", [n for n in optim.available() if n != "galore"])
def test_an_optimiser_without_settings_is_that_of_one_process(name):
    found = parts()
    trained = optim.Trained(found)
    assert trained == optim.Trained(found, betas=(0.9, 0.999), embedding=1.0)
    for options in ({}, {"form": "full"}) if name == "lorapro" else ({},):
        made = optim.make(name, **options)
        alone, divided = made.state_bytes(trained, 1), made.state_bytes(trained, 2)
        assert made.state_bytes(trained) == alone >= divided > 0
        assert (alone > divided) == ("form" in options)
