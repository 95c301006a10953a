"""The rank of a planted change is found, by cuts of a pilot and by a sweep."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import yaml
from oracles import starts as oracle
from support import tiny
from torch import nn

import veneer
from veneer.adapt.attached import changes, layers
from veneer.cli.frame import main
from veneer.errors import ConfigError
from veneer.files import read_json
from veneer.runs.fit import fit
from veneer.search.decide import plateau
from veneer.search.decide.plateau import Short
from veneer.search.decide.trial import FINISHED, Point, Progress
from veneer.search.rank import cuts, gradient
from veneer.search.rank.rank import rank
from veneer.search.rank.settings import RankSearch
from veneer.search.rank.sweep import runs, sweep
from veneer.sites import site_for
from veneer.tasks import Metric
from veneer.tasks.base.figure import Figure
from veneer.train.run import Run
from veneer.verbs.search.rank import text

METRIC = Metric("mse", "mean squared error")
D = 24


class Regression:
    """A task whose examples are pairs (x, y) of vectors."""

    METRIC = METRIC

    def measure(self, model, examples, *, batch, each=False):
        errors = torch.stack([(model(x) - y).square().mean() for x, y in examples]).double()
        return [Figure.of(METRIC, errors, torch.ones_like(errors))]


def planted(k, n=200, noise=0.02):
    """A linear layer, and examples of the layer with a change of rank k, equal singular values."""
    torch.manual_seed(k)
    model = nn.Sequential(nn.Linear(D, D, bias=False))
    U, V = (torch.linalg.qr(torch.randn(D, k)).Q for _ in range(2))
    xs = torch.randn(n, D)
    ys = xs @ (model[0].weight.detach() + U @ V.mT).mT + noise * torch.randn(n, D)
    return model, list(zip(xs, ys, strict=True))


def trained(model, examples, rank):
    veneer.attach(model, "lora", to=["0"], rank=rank, name="pilot")
    x, y = (torch.stack(some) for some in zip(*examples, strict=True))
    optimiser = torch.optim.Adam([p for d in layers(model) for p in d.parameters()], lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        (model(x) - y).square().mean().backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_a_pilot_finds_the_planted_rank(k):
    model, examples = planted(k)
    trained(model, examples[:150], 16)
    found = cuts.curve(model, "pilot", Regression(), examples[150:], [1, 2, 4, 8, 16], batch=8)
    answer = plateau.of_pilot(found)
    assert answer.rank == k and answer.reason.startswith(f"cut to rank {k}, the pilot of rank 16 loses")
    assert found[16].shortfall == 0 and all(found[r].shortfall > 0.01 for r in (1, 2, 4) if r < k)


def test_energy_gives_ranks_to_the_layers_that_change():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D))
    veneer.attach(model, "lora", to=["0", "1", "2"], rank=8, name="pilot")
    for (_, delta), size in zip(changes(model, "pilot"), (1.0, 1e-3, 1e-3), strict=True):
        nn.init.normal_(delta.B, std=size)
    found = cuts.pattern(model, "pilot", 4)
    assert found["0"] == 8 and sum(found.values()) == 12 and min(found.values()) >= 1
    examples = [(torch.randn(D), torch.randn(D)) for _ in range(9)]
    uneven = cuts.measured_by(model, "pilot", Regression(), examples, found, batch=8).value
    even = cuts.measured_by(model, "pilot", Regression(), examples, dict.fromkeys(found, 4), batch=8).value
    whole = cuts.measured_by(model, "pilot", Regression(), examples, dict.fromkeys(found, 8), batch=8).value
    assert abs(uneven - whole) < abs(even - whole)


@pytest.mark.parametrize(
    ("curve", "rank", "reason"),
    [
        (
            {1: Short(1.5, 0.5, 0.4, 0.6), 2: Short(1.01, 0.01, -0.01, 0.03), 4: Short(1.0, 0.0)},
            2,
            "than noise",
        ),
        (
            {1: Short(1.5, 0.5, 0.4, 0.6), 2: Short(1.001, 0.001, 5e-4, 2e-3), 4: Short(1.0, 0.0)},
            2,
            "0.005 of",
        ),
        ({1: Short(1.5, 0.5, 0.4, 0.6), 2: Short(1.2, 0.2, 0.1, 0.3), 4: Short(1.0, 0.0)}, 4, "higher still"),
        ({1: Short(0.9, -0.1), 4: Short(1.0, 0.0)}, 1, "0.005 of the score"),
    ],
)
def test_the_smallest_rank_within_noise_or_tolerance_is_taken(curve, rank, reason):
    answer = plateau.of_pilot(curve)
    assert answer.rank == rank and reason in answer.reason


def test_a_sweep_ends_at_the_first_doubling_that_gains_too_little():
    costs = {1: [2.0, 2.02], 2: [1.5, 1.52], 4: [1.2, 1.22], 8: [1.195, 1.215]}
    answer = plateau.of_sweep(costs)
    assert (
        answer.rank == 4
        and "rank 8 gains +0.005 over rank 4, less than the noise over seeds" in answer.reason
    )
    assert plateau.of_sweep({1: [2.0, 2.0], 2: [1.0, 1.0]}) is None
    assert "0.005 of the score" in plateau.of_sweep({1: [2.0, 2.0], 2: [1.999, 1.999]}).reason


def test_capacity_asks_for_parameters():
    assert plateau.floor(labels=100_000, parameters_per_rank=1000) == 50
    assert plateau.floor(labels=10, parameters_per_rank=1000) == 1


class Synthetic:
    """Trainings whose loss falls with the rank up to k, best at rate 1e-3; MLP layers do as well as all."""

    metric, steps = METRIC, 80

    def __init__(self, k):
        self.k, self.trained = k, set()

    def advance(self, trials, share):
        return {t: self.at(t, share) for t in trials}

    def at(self, t, share):
        self.trained.add(t)
        rank = int(t.label.split("-")[0][1:])
        end = 1 + 0.3 * max(0.0, math.log2(self.k / rank)) + math.log2(t.lr / 1e-3) ** 2 / 10
        end += 0.5 * t.label.endswith("attention") + random.Random(t.key).gauss(0, 0.01)
        points = tuple(Point(s, end + 1 - s / 80, s) for s in range(0, round(80 * share) + 1, 10))
        return Progress(share, FINISHED, points)

    def drop(self, trial, share, reason):
        pass


def swept(k, **changed):
    run, search = Run(data="a.txt", lr=5e-4), RankSearch(form="sweep", **changed)
    trainer = Synthetic(k)
    known = runs(run, search)
    found = sweep(trainer, run, search, lambda sentence: None)
    assert {t.label for t in trainer.trained} <= set(known)
    return found


@pytest.mark.parametrize("k", [1, 4, 16])
def test_a_sweep_finds_the_planted_rank_and_layers(k):
    found = swept(k)
    assert found["rank"] == k and found["lr"] == pytest.approx(1e-3)
    assert list(found["curve"]) == [2**i for i in range(int(math.log2(k)) + 2)]
    assert set(found["table"]) == {f"r{r}-{t}" for r in {1, k} for t in ("attention", "mlp", "all-linear")}
    assert "attention" not in found["layers"] and f"r{k}-mlp" in found["layers"]


def test_a_sweep_keeps_to_its_cost():
    found = swept(16, max_cost=4, widen=False)
    assert found["trainings"] == 4 and found["rank"] == 2 and "higher still" in found["reason"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"most": 1}, "most must be 2 or more, got 1"),
        ({"form": "sweep", "seeds": 1}, "seeds must be 2 or more to know the noise of a sweep, got 1"),
        ({"tolerance": 0.0}, "tolerance must be above 0 and below 1, got 0"),
    ],
)
def test_impossible_searches_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        RankSearch(**changed)


def test_the_command_writes_settings_that_fit_takes(tmp_path, capsys):
    given, out = tiny.settings(tmp_path, steps=8, test=str(tmp_path / "valid.txt")), tmp_path / "rank"
    line = ["--lr", "0.02", "--precision", "fp32", "--eval-windows", "4", "--compile", "off"]
    for name in ("model", "data", "valid", "test", "known", "steps", "batch", "length"):
        line += [f"--{name}", str(given[name])]
    assert main(["rank", *line, "--most", "8", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    found = read_json(out / "results.json")
    assert f"rank {found['rank']}: cut to rank" in shown and "next: veneer fit --config" in shown
    assert set(found["curve"]) == {"1", "2", "4", "8"} and set(found["test"]) >= {
        "uniform",
        "by_energy",
        "pilot",
    }
    assert max(found["rank_pattern"].values()) <= 8 and found["cost_ratio"] > 1
    settings = str(out / "rank.yaml")
    assert main(["fit", "--config", settings, *line, "--steps", "2", "--out", str(tmp_path / "fitted")]) == 0
    config = read_json(tmp_path / "fitted" / "config.json")["run"]
    assert config["options"] == {"rank": found["rank"]}
    assert main(["rank", *line, "--method", "ia3", "--out", str(tmp_path / "b")]) == 2


def test_fit_leaves_the_rank_to_a_pilot_and_records_it(tmp_path, capsys):
    given, out = tiny.settings(tmp_path, test=str(tmp_path / "valid.txt")), tmp_path / "fitted"
    line = ["--lr", "0.02", "--precision", "fp32", "--eval-windows", "4", "--compile", "off", "--steps", "16"]
    for name in ("model", "data", "valid", "test", "known", "batch", "length"):
        line += [f"--{name}", str(given[name])]
    assert main(["fit", *line, "--rank", "auto", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    found = read_json(tmp_path / "fitted-rank" / "results.json")
    config = read_json(out / "config.json")["run"]
    assert f"rank {found['rank']} in the mean: {found['reason']} (a pilot of 4 steps" in said
    assert config["options"]["rank"] == found["rank"] and config["steps"] == 16
    uneven = {n: r for n, r in found["rank_pattern"].items() if r != found["rank"]}
    better = found["test"]["by_energy"] < found["test"]["uniform"]
    small = {n: most for n, most in found["narrow"].items() if most < found["rank"]}
    assert config["rank_pattern"] == (uneven if better else small) and min(found["narrow"].values()) == 16
    sites = read_json(out / "adapter" / "veneer.json")["sites"]
    wanted = found["rank_pattern"] if better and uneven else {**dict.fromkeys(sites, found["rank"]), **small}
    assert {n: entry["rank"] for n, entry in sites.items()} == wanted
    assert main(["fit", *line, "--rank", "many", "--out", str(tmp_path / "b")]) == 2
    assert main(["rank", *line, "--rank", "auto", "--out", str(tmp_path / "c")]) == 2
    assert main(["fit", *line, "--method", "ia3", "--rank", "auto", "--out", str(tmp_path / "d")]) == 2


# -- by the gradient ---------------------------------------------------------------------------------------


def test_ranks_by_the_gradient_are_the_papers():
    draw = np.random.default_rng(0)
    shapes = [(6, 9), (20, 9), (9, 9), (30, 40)]
    Ws, Gs = ([draw.standard_normal(shape) for shape in shapes] for _ in range(2))
    Gs[1] *= 20
    Gs[2] *= 0.01
    shares = [float(np.abs(W * G).mean()) for W, G in zip(Ws, Gs, strict=True)]
    found = gradient.ranks(shapes, shares, 4)
    wanted = oracle.gora_ranks(Ws, Gs, 4, 2, 16)
    assert found == [min(r, *shape) for r, shape in zip(wanted, shapes, strict=True)]
    assert found[1] == 9 and found[2] == 2, "the most a layer can have, and half the mean rank"
    assert gradient.ranks(shapes, [0.0] * 4, 4) == [4] * 4


def test_importance_is_the_mean_product_with_the_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False).double())
    x = torch.randn(7, 5).double()
    stats = veneer.calibrate(model, [x], rank=4, loss=lambda m, x: m(x).square().sum(), to=["0"])
    W = model[0].weight
    model.requires_grad_(True)
    (G,) = torch.autograd.grad(model(x).square().sum(), W)
    expected = float((W * G).abs().mean())
    assert gradient.importance(site_for("0", model[0]), stats["0"]) == pytest.approx(expected)


def test_a_search_by_the_gradient_writes_ranks_that_fit_takes(tmp_path):
    given = tiny.settings(tmp_path, steps=2, eval_every=2, options={"rank": 2}, report=False)
    out = tmp_path / "search"
    found = rank(Run.from_dict(given), RankSearch(form="gradient", out=str(out)), progress=False)
    pattern = found["rank_pattern"]
    assert found["rank"] == 2 and len(pattern) > 3 and all(1 <= r <= 8 for r in pattern.values())
    assert not (out / "pilot").exists() and "by the gradient" in text(found)
    settings = yaml.safe_load((out / "rank.yaml").read_text())
    assert settings["rank_pattern"] == {n: r for n, r in pattern.items() if r != 2}
    run = Run.from_dict({**given, **settings, "out": str(tmp_path / "run")})
    fit(run, progress=False)
    record = read_json(tmp_path / "run" / "adapter" / "veneer.json")
    assert {n: entry["rank"] for n, entry in record["sites"].items()} == pattern
