"""Forecasts for several processes agree with what one, two and four of them exchange and hold."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from support import shared_cost, tiny
from typer.testing import CliRunner

from veneer.errors import ConfigError
from veneer.train.run import Run
from veneer.train.world import ALONE
from veneer.verbs.plan.processes import plan_processes, text

MEASURE = "support.shared_cost:measured"
WIDTHS = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}


@pytest.fixture
def given(tmp_path):
    tiny.settings(tmp_path)
    (tmp_path / "long.txt").write_text(tiny.text(1, 6000), encoding="utf-8")
    (tmp_path / "wide").mkdir()
    tiny.base(tmp_path / "wide" / "base", **WIDTHS)
    own: dict[str, Any] = dict(
        options={"rank": 8}, batch=8, accumulate=2, steps=3, eval_every=3, lr=1e-3, compile="off"
    )
    more = {"model": str(tmp_path / "wide" / "base"), "data": str(tmp_path / "long.txt")}
    return {**tiny.settings(tmp_path, **own), **more}


@pytest.mark.parametrize("shard", [False, True])
def test_bytes_exchanged_and_memory_are_as_forecast(shard, given, tmp_path, two, four):
    for ranks in (None, two, four):
        size = 1 if ranks is None else ranks.size
        own = {**given, "out": str(tmp_path / f"{size}{shard}"), "shard": shard and size > 1}
        found = plan_processes(Run.from_dict(own), size)
        real = shared_cost.measured(ALONE, own) if ranks is None else ranks.call(MEASURE, own)[0]
        if size > 1:
            assert real["wire"] == pytest.approx(found.wire.handed, rel=0.1)
        assert real["peak"] == pytest.approx(found.memory.peak, rel=0.15)


def test_eighty_layers_take_seconds_and_processes_divide_them(tmp_path):
    from transformers import LlamaConfig

    sizes: dict[str, Any] = dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
    LlamaConfig(**sizes, num_hidden_layers=80, num_key_value_heads=8, vocab_size=128256).save_pretrained(
        tmp_path
    )
    settings: dict[str, Any] = dict(data="-", model=str(tmp_path), precision="bf16", length=512, batch=64)
    started = time.process_time()
    few = plan_processes(Run(**settings, shard=True), 8)
    assert time.process_time() - started <= 10
    many, whole = plan_processes(Run(**settings, shard=True), 64), plan_processes(Run(**settings), 8)
    assert few.base == many.base == whole.base > 70e9
    assert many.memory.weights < few.memory.weights < whole.memory.weights
    assert whole.wire.blocks == 0 and few.wire.blocks > many.wire.blocks > 0
    assert "divided (FSDP2), 8 processes" in text(few)


def test_the_command_line_forecasts_processes(tmp_path):
    from veneer.cli.app import app

    flags = ["plan", "--data", "-", "--world-size", "4", "--length", "64", "--json"]
    outcome = CliRunner().invoke(app, flags)
    found = json.loads(outcome.stdout)
    assert found["processes"] == 4 and found["rows"] == 2 and found["wire_bytes"]["gradients"] > 0
    with pytest.raises(ConfigError, match="plans task 'causal-lm' on a plain base, got quantise='nf4'"):
        plan_processes(Run(data="-", quantise="nf4"), 2)


def test_recomputed_blocks_shrink_the_forecast_and_a_base_on_disk_has_none(given):
    plain = plan_processes(Run.from_dict(given), 2)
    recomputed = plan_processes(Run.from_dict({**given, "gradient_checkpointing": True}), 2)
    assert recomputed.memory.activations < plain.memory.activations / 2
    assert recomputed.flops > 1.2 * plain.flops and recomputed.wire == plain.wire
    with pytest.raises(ConfigError, match="plans a base in memory, and stream_base leaves it on disk"):
        plan_processes(Run.from_dict({**given, "stream_base": True}), 2)
