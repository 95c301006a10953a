"""Chooses the built-in model's learning rate for every optimiser on validation text: a coarse sweep at one seed.

    python bench/optimiser_rates.py --out runs/optimiser_rates

LoRA of rank 8 on the standard library's prose, 60 steps of 4 windows of 256 tokens; rates a factor of about three apart.
One seed and 60 steps say which rates are of the right size, and not which optimiser is better. Resumable; ends with one
JSON line, which --write puts into bench/results/optimiser_rates.json, from which a test checks train/rates.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from veneer.app import machine
from veneer.app.demo import Contender, settings
from veneer.app.fit import fit

GRID: dict[str, tuple[dict[str, Any], list[float]]] = {
    "adamw": ({}, [1.5e-3, 5e-3, 1.5e-2]),
    "scaled": ({}, [5e-4, 1.5e-3, 5e-3, 1.5e-2]),
    "balanced": ({}, [2e-4, 6e-4, 2e-3, 6e-3]),
    "lora-muon": ({}, [5e-4, 1.5e-3, 5e-3, 1.5e-2]),
    "lorapro": ({"form": "factored"}, [2e-4, 6e-4, 2e-3, 6e-3]),
    "lorapro-full": ({"form": "full"}, [2e-4, 6e-4, 2e-3, 6e-3]),
    "lorapro-sgd": ({"form": "sgd"}, [0.3, 1.0, 3.0, 10.0]),
}
TARGET, STEPS = "prose", 60


def measure(out: Path, label: str, options: dict[str, Any], rate: float) -> dict[str, float]:
    """Bits per byte on validation text before and after one training, and on known text after it."""
    file = out / f"{label}-{rate:g}.json"
    if not file.exists():
        work = out / "work"
        shutil.rmtree(work, ignore_errors=True)
        given = {"options": {"rank": 8}, "optimiser": label.split("-")[0] if options else label, "optimiser_options": options}
        run = settings(work, TARGET, label, Contender("lora", {}, given), steps=STEPS, seed=0, lr=rate)
        found = fit(run, progress=False)
        before, after = found.metrics["before"], found.metrics["after"]
        file.write_text(json.dumps({"before": before["valid"], "valid": after["valid"], "known": after["known"]}))
        shutil.rmtree(work)
    row: dict[str, float] = json.loads(file.read_text())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/optimiser_rates"))
    parser.add_argument("--write", action="store_true", help="keep the outcome in bench/results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, figures = [], {}
    for label, (options, rates) in GRID.items():
        tried = {rate: measure(args.out, label, options, rate) for rate in rates}
        rows += [{"optimiser": label, "rate": rate, **values} for rate, values in tried.items()]
        best = min(tried, key=lambda rate: tried[rate]["valid"])
        figures[f"{label}_rate"], figures[f"{label}_valid_bpb"] = best, tried[best]["valid"]
        print(label, {f"{rate:g}": round(v["valid"], 4) for rate, v in tried.items()}, flush=True)
    line = {"bench": "optimiser_rates", "device": "cpu", "versions": machine.versions(), "figures": figures, "rows": rows}
    if args.write:
        (Path(__file__).parent / "results" / "optimiser_rates.json").write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
