"""Recipes set what their studies recommend, and nothing that the user gave."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.errors import ConfigError
from veneer.search import recipes
from veneer.train.run import Run

DATA = {"data": ("a.txt",)}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_a_valid_run_at_ten_times_full_fine_tunings_rate(name: str) -> None:
    found, reason = recipes.applied(name, {**DATA, "model": "org/model"})
    run = Run.from_dict(found)
    assert run.method == "lora" and run.lr == pytest.approx(2e-4) and run.to is None
    assert recipes.RECIPES[name].source in reason and "all linear layers" in reason
    assert Run.from_dict(recipes.applied(name, DATA)[0]).lr == pytest.approx(6e-3)


@pytest.mark.parametrize(
    ("name", "given", "alpha"),
    [
        ("learns-less", {}, 512),
        ("learns-less", {"rank": 16}, 32),
        ("learns-less", {"rank": 16, "alpha": 8}, 8),
        ("without-regret", {}, 32),
        ("without-regret", {"rank": 16}, 32),
    ],
)
def test_alpha_follows_the_rank_as_the_study_has_it(name: str, given: dict[str, Any], alpha: float) -> None:
    found, _ = recipes.applied(name, {**DATA, "options": given})
    assert found["options"]["alpha"] == alpha
    assert found["options"]["rank"] == given.get("rank", recipes.RECIPES[name].settings["options"]["rank"])


def test_what_is_given_stays() -> None:
    found, reason = recipes.applied("learns-less", {**DATA, "lr": 1e-5, "steps": 7, "schedule": "linear"})
    assert (found["lr"], found["steps"], found["schedule"]) == (1e-5, 7, "linear")
    assert "epochs" not in found and "passes" not in reason


def test_unsuitable_recipes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'without-regrets'; did you mean 'without-regret'"):
        recipes.applied("without-regrets", DATA)
    with pytest.raises(ConfigError, match="is for LoRA, got method 'dora'; leave one out"):
        recipes.applied("learns-less", {**DATA, "method": "dora"})


def test_the_command_takes_a_recipe_and_prints_its_reasons(tmp_path: Any) -> None:
    words = ["plan", "--recipe", "without-regret", "--no-probe", "--rank", "4", "--json"]
    (tmp_path / "a.txt").write_text("a text to learn " * 200)
    made = CliRunner().invoke(app, [*words, "--data", str(tmp_path / "a.txt"), "--steps", "2"])
    assert made.exit_code == 0, made.output
    assert "LoRA Without Regret" in made.stderr and "alpha: 32 at every rank" in made.stderr
    assert json.loads(made.stdout)
