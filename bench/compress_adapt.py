"""Adapting what was compressed: learning, forgetting and bytes of LoRA and QLoRA on dense and on compressed
bases.

python bench/compress_adapt.py

The built-in model, dense and compressed to 0.8 of its linear layers by LoRD and by auto; LoRA of rank 8
learns English prose for 120 steps on each base in bfloat16 and in nf4. Known text is held-out library code.
Bytes are those of base and adapter in the files. Every run is kept in runs/bench-compress-adapt and not made
again.
"""

from __future__ import annotations

import json
from pathlib import Path

import _measure as m
import torch

import veneer
from veneer.cli.frame import main as command
from veneer.compress import folder as folders
from veneer.models import pretrained

KEPT = Path("runs") / "bench-compress-adapt"
BASES = {"dense": None, "lord": "lord", "auto": "auto"}
FORMATS = {"lora": None, "qlora": "nf4"}
KEEP, STEPS, RANK, RATE, SAMPLES = 0.8, 120, 8, 5e-3, 64


def base(name: str) -> str:
    """The base's folder, compressed where that was not done before."""
    method, out = BASES[name], KEPT / name
    if method is None:
        return "builtin"
    if not out.exists():
        words = ["--keep", str(KEEP), "--method", method, "--samples", str(SAMPLES), "--out", str(out)]
        if command(["compress", "builtin", *words]):
            raise RuntimeError(f"compressing by {method} failed")
    return str(out)


def run(name: str, how: str) -> dict[str, float]:
    """Bits per byte before and after, and bytes, of one run."""
    out = KEPT / f"{how}-{name}"
    if not (out / "results.json").is_file():
        settings = dict(model=base(name), data=("builtin:prose",), known=("builtin:known",), out=str(out))
        settings |= dict(method="lora", options={"rank": RANK}, steps=STEPS, lr=RATE, batch=8, length=256)
        settings |= dict(quantise=FORMATS[how], report=False, resume=out.exists())
        veneer.fit(veneer.Run(**settings), progress=False)
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    adapter = sum(p.stat().st_size for p in (out / "adapter").glob("*.safetensors"))
    return {
        "prose_before": found["learned"]["before"],
        "prose": found["learned"]["after"],
        "known_before": found["forgotten"]["before"],
        "known": found["forgotten"]["after"],
        "bytes": size(name, how) + adapter,
    }


def size(name: str, how: str) -> int:
    """Bytes of the base's weights in memory."""
    model = pretrained.causal_lm(base(name), torch.bfloat16, torch.device("cpu"), FORMATS[how])
    return sum(t.nbytes for t in folders.weights(model).values())


def main() -> None:
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    rows = {(how, name): run(name, how) for how in FORMATS for name in BASES}
    for (how, name), row in rows.items():
        figures |= {f"{how}_{name}_{key}": value for key, value in row.items()}
    for name in ("lord", "auto"):
        figures[f"qlora_over_{name}_bytes_over_qlora"] = (
            rows["qlora", name]["bytes"] / rows["qlora", "dense"]["bytes"]
        )
    m.report("compress_adapt", figures)


if __name__ == "__main__":
    main()
