"""Compares figures with the recorded ones, and fails where one is worse by more than 15 %: make bench-check.

python bench/check.py [bench ..]: runs these benches, or all of speed and memory that have a file in bench/results.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ALLOWED = 0.15
SWEEPS = {"demo_rates", "method_rates", "optimiser_rates", "scratch", "width", "loraga"}  # of learning; hours, and not of speed
LESS_IS_BETTER = ("_over_bound", "peak_vs_", "pissa_excess_ratio", "final_loss_difference", "_over_base")
LESS_IS_BETTER += ("_vs_default_adamw", "_mib", "_error", "_bits", "_over_whole", "_sketch_size", "_bpb", "_overhead", "_memory_vs_")
LESS_IS_BETTER += ("_kept_vs_", "_time_vs_lora", "_over_merged_")
# Not better in either direction, or seconds and bytes of one machine.
BESIDE = re.compile(r"veneer_minus_peft|peft_sd|.*_(crossover|predicted)_.*|.*_(bytes|wall|processor)|.*wall_error")


def worse(name: str, now: float, then: float) -> float:
    """By what share the figure is worse than it was; infinitely where it is none any more."""
    less = any(part in name for part in LESS_IS_BETTER)
    if BESIDE.fullmatch(name) or then <= 0:
        return 0.0
    if now > 0:
        return (now / then if less else then / now) - 1
    return 0.0 if less and now <= 0 else math.inf


def run(bench: str) -> dict[str, float]:
    """The figures of a bench, run now."""
    done = subprocess.run([sys.executable, str(HERE / f"{bench}.py")], check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["figures"]
    return figures


def main() -> int:
    failed = 0
    for bench in sys.argv[1:] or sorted({p.stem for p in RESULTS.glob("*.json")} - SWEEPS):
        recorded = json.loads((RESULTS / f"{bench}.json").read_text(encoding="utf-8"))["figures"]
        now = run(bench)
        for name, then in recorded.items():
            if name not in now:
                print(f"{name}: recorded as {then:g}, but not measured any more")
                failed += 1
            elif (by := worse(name, now[name], then)) > ALLOWED:
                print(f"{name}: {now[name]:g}, recorded as {then:g}: {by:.0%} worse")
                failed += 1
            else:
                print(f"{name}: {now[name]:g}, recorded as {then:g}")
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
