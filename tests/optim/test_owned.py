"""LoRA-Pro's full moments lie in one process each, and the training is that of one process."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import shared_cost, shared_runs, shared_steps, tiny
from support.shared_steps import largest

from veneer import optim
from veneer.optim.base.owned import owners
from veneer.train.folder import checkpoint
from veneer.train.run import Run
from veneer.train.world import ALONE
from veneer.verbs.plan.processes import plan_processes

STEP, RUN, MEASURE = (
    "support.shared_steps:train",
    "support.shared_runs:until",
    "support.shared_cost:measured",
)
FULL: dict[str, Any] = {"optimiser": "lorapro", "optimiser_options": {"form": "full"}}


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 6))
def test_loads_are_dealt_out_evenly(loads, processes):
    dealt = owners(loads, processes)
    held = [sum(n for n, owner in zip(loads, dealt, strict=True) if owner == i) for i in range(processes)]
    assert sum(held) == sum(loads) and max(held) - min(held) <= max(loads, default=0)
    assert dealt == owners(loads, processes)


@pytest.mark.parametrize("divided", [False, True])
def test_each_process_keeps_its_share_of_the_moments(divided, two, four):
    one = shared_steps.train(ALONE, **FULL)
    for ranks in (two, four):
        found = ranks.call(STEP, **FULL, divided=divided)
        assert largest(one, found[0]) <= 1e-6
        assert len({f["hash"] for f in found}) == 1
        states = [f["state"] for f in found]
        assert sum(states) == one["state"] and max(states) <= 1.2 * one["state"] / ranks.size
        if not divided:
            assert found[0]["wire"] == pytest.approx(2, abs=0.1)  # gradients, and the factors after the step


def test_moments_go_on_in_one_two_four_and_one_processes(tmp_path, two, four):
    settings: dict[str, Any] = dict(
        options={"rank": 4}, batch=4, accumulate=1, steps=12, eval_every=4, resume=True, lr=3e-3
    )
    own = {**tiny.settings(tmp_path, **settings), **FULL}
    shared_runs.until(ALONE, {**own, "out": str(tmp_path / "alone")}, 99)
    shared_runs.until(ALONE, own, 3)
    two.call(RUN, own, 6)
    four.call(RUN, own, 9)
    shared_runs.until(ALONE, own, 99)
    one, other = tiny.metrics(tmp_path / "alone"), tiny.metrics(tmp_path / "run")
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for a, b in zip(one, other, strict=True):
        for key in {"loss", "gradient_norm", "valid_bpb"} & a.keys():
            assert b[key] == pytest.approx(a[key], abs=1e-5), (a["step"], key)
    saved = [
        checkpoint.load(checkpoint.found(tmp_path / name / "checkpoints")[-1]) for name in ("alone", "run")
    ]
    assert saved[0].tensors.keys() == saved[1].tensors.keys()
    assert any(name.endswith("exp_avg_sq") for name in saved[0].tensors)


def test_memory_and_bytes_are_as_forecast(tmp_path, two):
    (tmp_path / "long.txt").write_text(tiny.text(1, 6000), encoding="utf-8")
    settings: dict[str, Any] = dict(
        options={"rank": 4}, batch=8, accumulate=1, steps=3, eval_every=3, lr=1e-3, compile="off"
    )
    own = {**tiny.settings(tmp_path, **settings), **FULL, "data": str(tmp_path / "long.txt")}
    found, real = plan_processes(Run.from_dict(own), 2), two.call(MEASURE, own)
    assert real[0]["wire"] == pytest.approx(found.wire.handed, rel=0.1) and found.wire.factors > 0
    assert max(r["peak"] for r in real) == pytest.approx(found.memory.peak, rel=0.15)
    alone = plan_processes(Run.from_dict(own), 1)
    assert found.memory.optimiser <= 0.6 * alone.memory.optimiser
    assert shared_cost.measured(ALONE, {**own, "out": str(tmp_path / "alone")})["peak"] > max(
        r["peak"] for r in real
    )


def test_other_forms_are_not_dealt_out():
    from support import models

    import veneer
    from veneer.optim.base import groups

    parts = groups.of_adapter(veneer.attach(models.llama(), rank=2), "default")
    for form in ("factored", "sgd"):
        rule = optim.make("lorapro", form=form)
        trained = optim.Trained(parts)
        assert rule.state_bytes(trained, 4) == rule.state_bytes(trained)
        assert rule.shared_bytes(trained, 4) == 0
