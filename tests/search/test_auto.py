"""`auto` is settled by a comparison, with the reason, or refused."""

from __future__ import annotations

import pytest

from veneer.cli import run_verbs
from veneer.errors import ConfigError
from veneer.search.auto import asked, settled
from veneer.train.folder import layout


def row(label, mean, parameters, **settings):
    own = {"method": "lora", "optimiser": "adamw", "to": None, "options": {"rank": 8}}
    score = {"mean": mean, "low": mean, "high": mean, "n": 3}
    own_row = {"label": label, "score": score, "lr": 2e-3, "trainable_parameters": parameters}
    return {**own_row, "settings": {**own, **settings}}


@pytest.fixture
def folder(tmp_path):
    rows = [
        row("full", 1.0, 1000, method="full", options={}),
        row("lora", 1.01, 80),
        row("lora-mlp", 1.02, 50, to="mlp"),
        row("loraplus", 1.5, 80, optimiser="loraplus"),
    ]
    found = {"methods": rows, "best": ["full", "lora", "lora-mlp"], "model": "builtin", "task": "causal-lm"}
    metric = {"name": "bpb", "unit": "", "lower_is_better": True}
    layout.put(tmp_path / "results.json", {**found, "seeds": 3, "metric": metric})
    return tmp_path


def test_the_smallest_of_those_that_tie_is_taken(folder):
    found = settled({"data": ["a.txt"], "method": "auto"}, folder)
    own = {"method": "lora", "to": "mlp", "optimiser": "adamw", "lr": 2e-3, "options": {"rank": 8}}
    assert found.settings == {"data": ["a.txt"], **own}
    reason = "lora-mlp at rate 0.002: it ties with full, lora and trains the fewest parameters"
    assert found.reason == f"{reason} ({folder}, 3 seeds)"


def test_settings_that_are_given_stay(folder):
    given = {"method": "lora", "optimiser": "auto", "lr": 1.0, "options": {"rank": 2}}
    found = settled(given, folder).settings
    assert (found["lr"], found["options"], found["optimiser"]) == (1.0, {"rank": 2}, "adamw")
    plus = settled({"method": "auto", "optimiser": "loraplus"}, folder)
    assert plus.settings["optimiser"] == "loraplus" and "it has the best score" in plus.reason
    assert asked(given) and not asked({"method": "lora"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "auto", "optimiser": "galore"}, "has no contender with optimiser 'galore'; add it to"),
        ({"method": "auto", "model": "./llama"}, "is of model 'builtin', not './llama'; compare on this one"),
    ],
)
def test_measurements_of_something_else_are_refused(folder, given, message):
    with pytest.raises(ConfigError) as e:
        settled(given, folder)
    assert message in str(e.value)


def test_the_command_line_settles_auto_and_says_why(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    values = {"method": "auto", "data": ["a.txt"]}
    with pytest.raises(ConfigError, match="needs a finished comparison in runs/compare; run veneer compare"):
        run_verbs.run_of(None, run_verbs.of_run(), values)
    (folder / "runs" / "compare").mkdir(parents=True)
    (folder / "results.json").rename(folder / "runs" / "compare" / "results.json")
    run = run_verbs.run_of(None, run_verbs.of_run(), values)
    assert (run.method, run.to, run.lr) == ("lora", "mlp", 2e-3)
    assert "lora-mlp at rate 0.002: it ties with full, lora" in capsys.readouterr().err
