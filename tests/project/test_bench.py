"""The figures that benches have recorded: whole, those that docs quote, and which way they get worse."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"
RECORDED = sorted((BENCH / "results").glob("*.json"))
SCRIPTS = {p.stem for p in BENCH.glob("[a-z]*.py")} - {"check"}
WORSE = {  # recorded, measured now, and by what share that is worse
    "h512_32k_bf16_vs_peft": (2.0, 1.6, 0.25),
    "h512_32k_bf16_over_bound": (2.0, 2.5, 0.25),
    "peak_vs_peft": (0.4, 0.5, 0.25),
    "dora_kept_vs_lora": (2.0, 2.5, 0.25),
    "bat_kept_vs_peft": (0.1, 0.2, 1.0),
    "dora_time_vs_lora": (1.0, 1.2, 0.2),
    "miss_saved_memory_vs_lora": (0.2, 0.3, 0.5),
    "bottleneck_over_merged_lora_1_token": (1.2, 1.5, 0.25),
    "decode_64_r4_overhead": (0.5, 0.6, 0.2),
    "dora_vs_peft": (2.0, 2.5, -0.2),
    "prefix_vs_peft": (1.0, float("nan"), float("inf")),
    "nf4_bits": (4.0, float("nan"), float("inf")),
    "prefill_d512_overhead": (0.2, -0.01, 0.0),
    "peft_sd": (0.1, 0.3, 0.0),
    "lora_wall": (1.0, 3.0, 0.0),
    "lora_bytes_error": (0.02, 0.1, 0.08),
    "qlora_part_error_max": (0.0, 0.2, 0.2),
    "time_error": (0.02, float("nan"), float("inf")),
    "nf4_weight_error": (0.1, 0.2, 1.0),
}


def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check", BENCH / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures() -> dict[str, float]:
    return {
        name: value
        for path in RECORDED
        for name, value in json.loads(path.read_text(encoding="utf-8"))["figures"].items()
    }


def test_every_bench_has_a_record():
    assert {p.stem for p in RECORDED} >= SCRIPTS


@pytest.mark.parametrize("path", [p for p in RECORDED if p.stem in SCRIPTS], ids=lambda p: p.stem)
def test_a_record_is_the_line_of_its_bench(path: Path):
    line = json.loads(path.read_text(encoding="utf-8"))
    assert line["bench"] == path.stem and line["device"] and line["versions"]["torch"]
    assert line["figures"] and all(isinstance(v, (int, float)) for v in line["figures"].values())


def test_the_readmes_tables_have_the_recorded_figures():
    recorded, rows = (
        figures(),
        re.findall(
            r"^\| `(\w+)`[^|]*\| (-?\d+\.?(\d*))", (BENCH / "README.md").read_text(encoding="utf-8"), re.M
        ),
    )
    shown = {name: (float(value), len(digits)) for name, value, digits in rows if name in recorded}
    assert len(shown) > 30
    for name, (value, digits) in shown.items():
        assert abs(value - recorded[name]) <= 0.501 * 10**-digits, name


def test_records_of_another_device_are_not_compared(capsys):
    recorded = {"device": "A", "figures": {"x_vs_peft": 2.0, "gone": 1.0}}
    now = {"device": "B", "figures": {"x_vs_peft": 1.0}}
    assert check().compared("x", recorded, now) == 0
    assert "recorded on A, measured on B; not compared" in capsys.readouterr().out
    assert check().compared("x", recorded, {**now, "device": "A"}) == 2
    assert check().compared("x", recorded, {**recorded, "figures": {"x_vs_peft": 1.9, "gone": 1.0}}) == 0
    assert "x_vs_peft: 1.9, recorded as 2\n" in capsys.readouterr().out


def test_the_avoidable_time_that_is_gone():
    spec = importlib.util.spec_from_file_location("train_step", BENCH / "train_step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        spec.loader.exec_module(module)
    gone = module.removed("x", {"peft": 10.0, "compiled": 6.0, "veneer": 4.0, "bound": 2.0})
    assert gone == {"x_avoidable_removed": 0.75, "x_avoidable_removed_by_compiled_peft": 0.5}


@pytest.mark.parametrize("name", WORSE)
def test_a_figure_is_worse_in_its_own_direction(name: str):
    then, now, by = WORSE[name]
    assert check().worse(name, now, then) == pytest.approx(by)
