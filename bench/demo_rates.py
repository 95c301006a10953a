"""Chooses the demo's learning rates on validation text, and measures how much a result moves with the seed.

    python bench/demo_rates.py --out runs/demo_rates

Every contender of the demo at five rates a factor of two apart, seed 0; then two more seeds at the chosen
one. Chosen is, among the rates whose validation text comes within 0.01 bits per byte of the best (about one
standard deviation over seeds), the one that forgets least: the sweep measures known text anyway, and no
contender should look worse for a tie. Resumable. Ends with one JSON line; --write puts it into
bench/results/demo_rates.json, from which a test checks the demo's own rates.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

from _sweep import Row, arguments, conclude, kept

from veneer.embedded.texts import DOMAINS, has
from veneer.runs.fit import fit
from veneer.verbs.demo.contenders import CONTENDERS, settings

GRID = {
    "full": [1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3],
    "lora": [1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2],
    "loraplus": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
}
STEPS, SEEDS, TIE = 100, (0, 1, 2), 0.01


def measure(out: Path, target: str, label: str, rate: float, seed: int) -> Row:
    """Bits per byte after one training: on validation text, and on known text."""
    return kept(out / f"{target}-{label}-{rate:g}-{seed}.json", partial(_train, target, label, rate, seed))


def _train(target: str, label: str, rate: float, seed: int, work: Path) -> Row:
    run = settings(work, target, label, CONTENDERS[label], steps=STEPS, seed=seed, lr=rate)
    after = fit(run, progress=False).metrics["after"]
    return {"valid": after["valid"], "known": after["known"]}


def choose(tried: dict[float, dict[str, float]]) -> float:
    """Returns the rate that forgets least among those that learn as much as the best."""
    least = min(values["valid"] for values in tried.values())
    return min(
        (rate for rate, v in tried.items() if v["valid"] <= least + TIE),
        key=lambda rate: tried[rate]["known"],
    )


def main() -> None:
    args = arguments(__doc__, "demo_rates")
    rows, figures = [], {}
    for target in (d for d in DOMAINS if has(d)):
        for label, rates in GRID.items():
            tried = {rate: measure(args.out, target, label, rate, 0) for rate in rates}
            best = choose(tried)
            seeds = [measure(args.out, target, label, best, seed) for seed in SEEDS]
            rows += [
                {"target": target, "method": label, "rate": rate, **values} for rate, values in tried.items()
            ]
            figures[f"{target}_{label}_rate"] = best
            for key in ("valid", "known"):
                figures[f"{target}_{label}_{key}_bpb"] = statistics.mean(s[key] for s in seeds)
                figures[f"{target}_{label}_{key}_sd"] = statistics.stdev(s[key] for s in seeds)
    conclude("demo_rates", figures, rows, write=args.write)


if __name__ == "__main__":
    main()
