"""Chooses each method's learning rate on the built-in model, coarsely, by validation text.

    python bench/method_rates.py --out runs/method_rates [method ..]

Short trainings on English prose, one seed, four rates a factor of four apart: enough to tell rates that are
wrong from those that are not, and no comparison of methods. Chosen is the rate with the least bits per byte
on validation text. Resumable. Ends with one JSON line; --write puts it into bench/results/method_rates.json,
from which a test checks the default rates.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from _sweep import Row, arguments, conclude, kept

from veneer.runs.fit import fit
from veneer.train.run import Run

STEPS, LENGTH, WINDOWS = 30, 128, 12
# method -> its options, the layers it adapts if not its own choice, and the lowest of the four rates
TRIED: dict[str, tuple[dict[str, Any], str | None, float]] = {
    "lora": ({}, None, 1.25e-3),
    "miss": ({"rank": 16}, None, 5e-4),
    "bat": ({"rank": 16}, None, 5e-4),
    "fourierft": ({}, None, 5e-2),
    "loldu": ({}, None, 5e-4),
    "loraxs": ({}, None, 1e-3),
    "vera": ({}, None, 5e-3),
    "ia3": ({}, None, 8e-3),
    "flora": ({}, None, 2e-3),
    "bitfit": ({}, "all-linear", 4e-3),
    "bottleneck": ({"rank": 16}, None, 5e-4),
    "prefix": ({"length": 16}, None, 2e-2),
}


def measure(method: str, rate: float, work: Path) -> Row:
    """Bits per byte of validation text before and after one training."""
    options, to, _ = TRIED[method]
    settings = {
        "data": ["builtin:prose"],
        "known": ["none"],
        "steps": STEPS,
        "length": LENGTH,
        "eval_windows": WINDOWS,
    }
    settings |= {"eval_every": STEPS, "report": False, "out": str(work)}
    found = fit(
        Run.from_dict({**settings, "method": method, "options": options, "to": to, "lr": rate}),
        progress=False,
    )
    after, before = found.metrics["after"], found.metrics["before"]
    return {
        "before": before["valid"],
        "after": after["valid"],
        "trained": found.metrics["trainable_parameters"],
    }


def main() -> None:
    args = arguments(__doc__, "method_rates", methods=[*TRIED])
    rows, figures = [], {}
    for method in args.methods:
        rates = [TRIED[method][2] * 4**i for i in range(4)]
        tried = {
            rate: kept(args.out / f"{method}-{rate:g}.json", partial(measure, method, rate)) for rate in rates
        }
        rows += [{"method": method, "rate": rate, **values} for rate, values in tried.items()]
        best = min(tried, key=lambda rate: tried[rate]["after"])
        figures[f"{method}_rate"], figures[f"{method}_bpb"] = best, tried[best]["after"]
        print(method, {f"{rate:g}": round(v["after"], 4) for rate, v in tried.items()}, flush=True)
    conclude("method_rates", figures, rows, write=args.write)


if __name__ == "__main__":
    main()
