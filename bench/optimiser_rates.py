"""Chooses each optimiser's learning rate on the built-in model: a coarse sweep, one seed.

    python bench/optimiser_rates.py --out runs/optimiser_rates

LoRA of rank 8 on the standard library's prose, 60 steps of 4 windows of 256 tokens; rates a factor of about
three apart. One seed and 60 steps say which rates are of the right size, and not which optimiser is better.
Resumable; ends with one JSON line, which --write puts into bench/results/optimiser_rates.json, from which a
test checks train/rates.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from _sweep import Row, arguments, conclude, kept

from veneer.runs.fit import fit
from veneer.verbs.demo.contenders import Contender, settings

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


def measure(label: str, rate: float, work: Path) -> Row:
    """Bits per byte on validation text before and after one training, and on known text after it."""
    options = GRID[label][0]
    given = {
        "options": {"rank": 8},
        "optimiser": label.split("-")[0] if options else label,
        "optimiser_options": options,
    }
    found = fit(
        settings(work, TARGET, label, Contender("lora", {}, given), steps=STEPS, seed=0, lr=rate),
        progress=False,
    )
    before, after = found.metrics["before"], found.metrics["after"]
    return {"before": before["valid"], "valid": after["valid"], "known": after["known"]}


def main() -> None:
    args = arguments(__doc__, "optimiser_rates")
    rows, figures = [], {}
    for label, (_, rates) in GRID.items():
        tried = {
            rate: kept(args.out / f"{label}-{rate:g}.json", partial(measure, label, rate)) for rate in rates
        }
        rows += [{"optimiser": label, "rate": rate, **values} for rate, values in tried.items()]
        best = min(tried, key=lambda rate: tried[rate]["valid"])
        figures[f"{label}_rate"], figures[f"{label}_valid_bpb"] = best, tried[best]["valid"]
        print(label, {f"{rate:g}": round(v["valid"], 4) for rate, v in tried.items()}, flush=True)
    conclude("optimiser_rates", figures, rows, write=args.write)


if __name__ == "__main__":
    main()
