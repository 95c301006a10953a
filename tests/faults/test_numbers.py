"""NaN and infinity, wherever they come from, never end in a traceback, a checkpoint or a silent load."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models, tally, tiny
from support.resuming import assert_same

import veneer
from veneer import methods, optim, settings, tasks
from veneer.adapt import attached
from veneer.errors import ConfigError, FormatError
from veneer.runs.dial import Point, finite
from veneer.runs.fit import fit
from veneer.runs.fit_many import fit_many
from veneer.tasks.causal_lm import CausalLM
from veneer.train.errors import Diverged
from veneer.train.folder.result import Result
from veneer.train.loop.loop import Loop
from veneer.train.loop.step import Learner
from veneer.train.run import Run

SHORT = {"steps": 8, "eval_every": 4, "save_every": 3}
ODD = (math.nan, math.inf, -math.inf)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("numbers")


@pytest.fixture(scope="module")
def whole(place) -> Path:
    train(tiny.settings(place, **SHORT, out=str(place / "whole")))
    return place / "whole"


@pytest.fixture
def given(place, tmp_path) -> dict[str, Any]:
    return tiny.settings(place, **SHORT, out=str(tmp_path / "run"))


def train(given: dict[str, Any], **changed: Any) -> Result:
    return fit(Run.from_dict({**given, **changed}), progress=False)


def steps(given: dict[str, Any]) -> list[str]:
    return sorted(p.name for p in (Path(given["out"]) / "checkpoints").glob("*"))


def broken(patch: pytest.MonkeyPatch, at: int, index: int = 0, value: float = math.nan) -> None:
    """From now on a figure of the evaluation at that step is this value. index: of the figure."""
    own, measure = CausalLM.measure, Loop.measure
    now = [0]

    def follow(loop, names):
        now[0] = loop.position.step
        return measure(loop, names)

    def wrong(*args, **kwargs):
        found = own(*args, **kwargs)
        if now[0] == at:
            found[index : index + 1] = [
                found[0]._replace(name=found[0].name if not index else "x", value=value)
            ]
        return found

    patch.setattr(Loop, "measure", follow)
    patch.setattr(CausalLM, "measure", wrong)


# -- evaluations


@pytest.mark.parametrize("value", tally.few(ODD))
def test_an_evaluation_that_is_no_number_ends_the_run_and_the_good_state_goes_on(given, whole, value):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Diverged) as e:
        broken(patch, 8, value=value)
        train(given)
    assert f"text is {value} at step 8; resume=True goes on from step-000006; lower lr" in str(e.value)
    assert steps(given) == ["step-000003", "step-000004", "step-000006"]
    assert str(value) not in (Path(given["out"]) / "metrics.jsonl").read_text()
    train(given, resume=True)
    assert_same(given, whole)


def test_a_base_that_cannot_be_evaluated_is_refused(given):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Diverged, match="the base cannot compute"):
        broken(patch, 0)
        train(given)
    assert steps(given) == []


def test_a_further_figure_that_is_no_number_is_null(given):
    with pytest.MonkeyPatch.context() as patch:
        broken(patch, 4, index=1)
        train(given)
    lines = [json.loads(line) for line in (Path(given["out"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["valid_x"] for line in lines if "valid_x" in line] == [None]


def test_a_test_text_that_cannot_be_measured_is_left_out(given, place):
    test = place / "known.txt"
    with pytest.MonkeyPatch.context() as patch:
        own = Loop.measure

        def wrong(loop, names):
            found = own(loop, names)
            if names == ["test"]:
                found["test"] = [found["test"][0]._replace(value=math.nan)]
            return found

        patch.setattr(Loop, "measure", wrong)
        result = train(given, test=str(test))
    assert result.metrics["learned"]["text"] == "valid" and "test" not in result.metrics["after"]
    assert any("of test text is nan, and left out" in note for note in result.metrics["notes"])


def test_strengths_without_a_figure_leave_the_dial():
    good, bad = [Point(0.0, 2.0, 1.0), Point(1.0, 1.0, 2.0)], [Point(0.0, 2.0), Point(1.0, math.nan)]
    assert finite(good, good) == [good, good]
    assert finite(good, bad) == [good[:1], bad[:1]]
    assert finite([Point(0.0, 2.0, math.inf)], good) == [[], good[1:]]


# -- parameters


def poisoned(patch: pytest.MonkeyPatch, at: int, value: float, out: str | None = None) -> None:
    """The optimiser makes a parameter infinite or NaN in that step."""
    own, taken = Learner.step, []

    def learn(learner, *rest):
        outcome = own(learner, *rest)
        taken.append(None)
        if len(taken) == at:
            with torch.no_grad():
                learner.parts[1].parameter[0, 0] = value
        return outcome

    patch.setattr(Learner, "step", learn)


@pytest.mark.parametrize("value", tally.few(ODD))
@pytest.mark.parametrize("changed", [{}, {"ema": 0.9}])
def test_a_parameter_that_is_no_number_is_never_saved(given, place, changed, value):
    whole = {**given, **changed, "out": str(Path(given["out"]).parent / "whole")}
    train(whole)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Diverged) as e:
        poisoned(patch, 6, value)
        train(given, **changed)
    assert "trained parameters are infinite or NaN after step 6: " in str(e.value)
    assert "resume=True goes on from step-000004; lower lr" in str(e.value)
    assert steps(given) == ["step-000003", "step-000004"]
    train(given, **changed, resume=True)
    assert_same(given, Path(whole["out"]))


def test_of_runs_trained_together_the_good_ones_are_saved(place, tmp_path):
    both = [tiny.settings(place, **SHORT, options={"rank": 4}, out=str(tmp_path / n)) for n in "ab"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Diverged):
        own, taken = Learner.finish, []

        def finish(learner, *rest):
            outcome = own(learner, *rest)
            taken.append(None)
            if len(taken) == 9:  # the first run's fifth step
                with torch.no_grad():
                    learner.parts[0].parameter.fill_(math.nan)
            return outcome

        patch.setattr(Learner, "finish", finish)
        fit_many([Run.from_dict(given) for given in both], progress=False)
    assert steps(both[0])[-1] == "step-000004" and steps(both[1])[-1] >= "step-000005"


# -- settings and files


def fractions() -> list[tuple[str, dict[str, Any]]]:
    """Every setting and option that is a fraction, as settings of a run with X in its place."""
    found = [(n, {n: "X"}) for n, s in settings.table(Run).items() if "float" in str(s.hint)]
    for m in methods.available():
        own = methods.options_of(m).items()
        found += [(f"{m}.{n}", {"method": m, "options": {n: "X"}}) for n, p in own if "float" in str(p)]
    for o in optim.available():
        own = optim.options_of(o).items()
        found += [
            (f"{o}.{n}", {"optimiser": o, "optimiser_options": {n: "X"}}) for n, p in own if "float" in str(p)
        ]
    for t in tasks.available():
        own = tasks.options_of(t).items()
        found += [(f"{t}.{n}", {"task": t, "task_options": {n: "X"}}) for n, p in own if "float" in str(p)]
    return found


def filled(given: Any, value: float) -> Any:
    if isinstance(given, dict):
        return {k: filled(v, value) for k, v in given.items()}
    return value if given == "X" else given


def test_no_setting_takes_a_number_that_is_none():
    every = fractions()
    assert len(every) > 25
    for name, given in every:
        for value in ODD:
            own = filled(given, value)
            own = {**own, "betas": (0.9, value)} if name == "betas" else own
            own = {**own, "alpha_pattern": {"q": value}} if name == "alpha_pattern" else own
            with pytest.raises(ConfigError) as e:
                Run.from_dict({"model": "m", "data": ["a.txt"], "out": "x", **own})
            assert str(value) in str(e.value), name


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["lora_alpha", "lora_dropout", "alpha_pattern"])
def test_a_peft_setting_that_is_no_number_is_refused(tmp_path, name, value):
    model = models.llama()
    veneer.attach(model, "lora", rank=4)
    with torch.no_grad():
        for _, delta in attached.changes(model, "default"):
            delta.B.normal_()
    veneer.save(model, tmp_path)
    (tmp_path / "veneer.json").unlink()
    config = tmp_path / "adapter_config.json"
    content = json.loads(config.read_text())
    content[name] = {"q_proj": "X"} if name == "alpha_pattern" else "X"
    config.write_text(json.dumps(content).replace('"X"', value))
    where = "alpha_pattern.q_proj" if name == "alpha_pattern" else name
    shown = value.lower().replace("infinity", "inf").replace("1e999", "inf")
    with pytest.raises(FormatError) as e:
        veneer.load(models.llama(), tmp_path)
    assert str(e.value) == (f"{config}: numbers must be finite, got {where} = {shown}; restore or correct it")
