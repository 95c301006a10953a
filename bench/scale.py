"""Measures large trainings: processes, checkpoints, a base on disk, and the plan's forecasts.

    python bench/scale.py

A LoRA of rank 8 on a small Llama, float32, gloo, one thread a process, all on one machine. Processes share
its cores, so seconds per example are the processor's, of all processes. Bytes are those handed to
collectives, of the gradients alone as a ratio to them. `plan_error` is the largest relative error of forecast
bytes over 1, 2 and 4 processes; `plan_seconds_80_layers` is the processor's time for a base of 70 billion
parameters. `streamed_peak_over_block`: a process of its own trains a tiny base first, then one of 16 blocks
on disk. The figure is its peak resident memory over what it held between, in bytes of a block.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import _measure as m
import torch
from support import ranks, shared_cost, tiny

from veneer.train.run import Run
from veneer.train.world import ALONE
from veneer.verbs.plan.processes import plan_processes

MEASURE = "support.shared_cost:measured"
WIDTHS = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
DEEP = {"hidden_size": 768, "intermediate_size": 2112, "num_hidden_layers": 16}
LARGE: dict[str, Any] = dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64)


def settings(folder: Path) -> dict[str, Any]:
    """Returns a run of a few steps on a small Llama."""
    own: dict[str, Any] = dict(options={"rank": 8}, batch=8, accumulate=2, steps=4, eval_every=4, lr=1e-3)
    given = tiny.settings(folder, **own, compile="off", length=64)
    (folder / "wide").mkdir()
    base = tiny.base(folder / "wide" / "base", **WIDTHS)
    (folder / "long.txt").write_text(tiny.text(1, 12000), encoding="utf-8")
    return {**given, "model": str(base), "data": str(folder / "long.txt")}


def of_streamed(folder: Path) -> dict[str, float]:
    """Returns the peak memory of a training with its base on disk, in blocks, and the base over that peak."""
    child = [sys.executable, __file__, "--streamed", str(folder)]
    (folder / "deep").mkdir()
    tiny.base(folder / "deep" / "base", **DEEP)
    out = subprocess.run(child, check=True, capture_output=True, text=True).stdout
    return {name: float(value) for name, value in json.loads(out.splitlines()[-1]).items()}


def streamed(folder: Path) -> dict[str, float]:
    """Returns the figures of `of_streamed`, in this process."""
    from veneer.analyse.cost import process_memory
    from veneer.models.from_disk import from_disk
    from veneer.models.on_disk import shelf_of
    from veneer.runs.fit import fit
    from veneer.train.speed.compiling import _give_back_memory

    cpu, names = torch.device("cpu"), {"options": {"rank": 4}, "to": r".*(q|v)_proj", "batch": 1}
    (folder / "small").mkdir()
    given = tiny.settings(folder / "small", **names, accumulate=1, steps=2, eval_every=2, save_every=2)
    given = {**given, "known": (), "stream_base": True, "out": str(folder / "small" / "run")}
    fit(Run.from_dict(given), progress=False)
    _give_back_memory()
    before = process_memory.forget_peak(cpu)
    deep = str(folder / "deep" / "base")
    started = time.process_time()
    fit(Run.from_dict({**given, "model": deep, "out": str(folder / "deep" / "run")}), progress=False)
    peak, took = process_memory.peak(cpu), time.process_time() - started
    assert peak is not None and before is not None
    shelf = shelf_of(from_disk(deep, torch.float32, cpu))
    assert shelf is not None
    over = {"streamed_peak_over_block": (peak - before) / shelf.block_bytes}
    return {**over, "streamed_base_over_peak": shelf.bytes / (peak - before), "streamed_processor": took}


def relative(forecast: float, real: float) -> float:
    return abs(forecast - real) / real


def of_processes(given: dict[str, Any], folder: str) -> dict[str, float]:
    """Returns figures of 1, 2 and 4 processes, with a whole base and a divided one."""
    found: dict[str, float] = {}
    wires, memories = [], []
    for size in (1, 2, 4):
        group = ranks.Ranks(size, tempfile.mkdtemp(dir=folder)) if size > 1 else None
        for name in ("ddp", "fsdp2") if group else ("alone",):
            own = {**given, "out": f"{folder}/{name}{size}", "shard": name == "fsdp2"}
            real = group.call(MEASURE, own)[0] if group else shared_cost.measured(ALONE, own)
            forecast = plan_processes(Run.from_dict(own), size)
            if group:
                wires.append(relative(forecast.wire.handed, real["wire"]))
            memories.append(relative(forecast.memory.peak, real["peak"]))
            found[f"{name}_{size}_example_processor"] = real["processor"] * size / (8 * 2)
            if (name, size) == ("ddp", 2):
                found["wire_bytes_over_adapter_gradients"] = real["wire"] / forecast.wire.gradients
        if group:
            group.close()
    for name in ("ddp", "fsdp2"):
        seconds = found[f"{name}_2_example_processor"]
        found[f"{name}_2_overhead"] = seconds / found["alone_1_example_processor"] - 1
    return {**found, "plan_error": max(wires), "plan_memory_error": max(memories)}


def of_checkpoint(out: Path) -> dict[str, float]:
    """Returns a checkpoint's bytes over those of adapter and optimiser, and the seconds to write it."""
    from veneer.train.folder import checkpoint

    newest = checkpoint.load(checkpoint.found(out / "checkpoints")[-1])
    state = sum(t.nbytes for n, t in newest.tensors.items() if n[:2] in ("p.", "o.", "b."))
    folder = out / "checkpoints" / f"step-{newest.step:06d}"
    started = time.monotonic()
    checkpoint.save(out, newest.step, newest.tensors, newest.meta)
    took = time.monotonic() - started
    total = sum(p.stat().st_size for p in folder.iterdir())
    return {"checkpoint_bytes_over_adapter_state": total / state, "checkpoint_wall": took}


def of_large(folder: Path) -> dict[str, float]:
    """Returns the seconds of a forecast for 80 layers."""
    from transformers import LlamaConfig

    sizes = {**LARGE, "num_hidden_layers": 80, "num_key_value_heads": 8, "vocab_size": 128256}
    LlamaConfig(**sizes).save_pretrained(folder / "large")
    run = Run(data="-", model=str(folder / "large"), precision="bf16", length=2048, batch=64, shard=True)
    started = time.process_time()
    plan_processes(run, 64)
    return {"plan_seconds_80_layers": time.process_time() - started}


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--streamed"]:
        print(json.dumps(streamed(Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        given = settings(Path(folder))
        found = of_processes(given, folder)
        found |= of_checkpoint(Path(folder) / "ddp2")
        found |= of_large(Path(folder))
        found |= of_streamed(Path(folder))
    m.report("scale", {name: round(value, 4) for name, value in found.items()})


if __name__ == "__main__":
    main()
