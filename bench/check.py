"""Compares figures with the recorded ones, and fails where one is worse by more than 15 %: make bench-check.

    python bench/check.py [bench ..]

Runs these benches, or all of speed and memory that have a file in bench/results. Only records of this device
are compared. Errors of a forecast are
shares themselves, and near nothing where it is good: they are compared by difference, so that 0.02 may become
0.12, and not by how many times.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ALLOWED = 0.15
ALLOWED_FORECAST = 0.1  # by which forecasts of `plan` were seen to differ from round to round
# of learning; hours, and not of speed
SWEEPS = {"demo_rates", "method_rates", "optimiser_rates", "scratch", "width", "loraga", "trp"}
SWEEPS |= {"compress", "compress_adapt", "compress_real", "first_run", "real"}
SWEEPS |= {"probe", "gpu"}  # faults found, and a card's own figures
LESS_IS_BETTER = ("_over_bound", "peak_vs_", "pissa_excess_ratio", "final_loss_difference", "_over_base")
LESS_IS_BETTER += (
    "_vs_default_adamw",
    "_mib",
    "_error",
    "_bits",
    "_over_whole",
    "_sketch_size",
    "_bpb",
    "_overhead",
    "_memory_vs_",
)
LESS_IS_BETTER += ("bank_time_ratio", "bank_step_ratio", "bank_memory_ratio", "search_time_ratio")
LESS_IS_BETTER += ("_kept_vs_", "_time_vs_lora", "_over_merged_")
# Not better in either direction, or seconds and bytes of one machine.
FORECAST = re.compile(r"memory_error|time_error|\w+_(bytes|processor)_error|\w+_part\w*_error\w*")
BESIDE = re.compile(
    r"veneer_minus_peft|peft_sd|.*_(crossover|predicted)_.*|.*_(bytes|wall|processor|per_second)|.*wall_error"
)


def worse(name: str, now: float, then: float) -> float:
    """Returns the relative loss of a figure; the absolute one for errors; infinity for a missing figure."""
    if FORECAST.fullmatch(name):
        return now - then if math.isfinite(now) else math.inf
    less = any(part in name for part in LESS_IS_BETTER)
    if BESIDE.fullmatch(name) or then <= 0:
        return 0.0
    if now > 0:
        return (now / then if less else then / now) - 1
    return 0.0 if less and now <= 0 else math.inf


def run(bench: str) -> dict[str, Any]:
    """Returns the line of a bench, run now."""
    done = subprocess.run(
        [sys.executable, str(HERE / f"{bench}.py")], check=True, stdout=subprocess.PIPE, text=True
    )
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def compared(bench: str, recorded: dict[str, Any], now: dict[str, Any]) -> int:
    """Prints a bench's figures beside the recorded ones, and returns the number of worse ones.

    A record of another device says nothing about this one: its figures are shown, and none counts as worse.
    """
    if recorded["device"] != now["device"]:
        print(f"{bench}: recorded on {recorded['device']}, measured on {now['device']}; not compared")
        for name, value in now["figures"].items():
            print(f"{name}: {value:g}")
        return 0
    failed = 0
    for name, then in recorded["figures"].items():
        if name not in now["figures"]:
            print(f"{name}: recorded as {then:g}, but not measured any more")
            failed += 1
            continue
        value, allowed = now["figures"][name], ALLOWED_FORECAST if FORECAST.fullmatch(name) else ALLOWED
        by = worse(name, value, then)
        failed += by > allowed
        print(f"{name}: {value:g}, recorded as {then:g}" + (f": {by:.0%} worse" if by > allowed else ""))
    return failed


def main() -> int:
    recorded_ones = sorted(
        p.stem for p in RESULTS.glob("*.json") if (HERE / p.name).with_suffix(".py").exists()
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benches", nargs="*", metavar="bench", help=f"of {', '.join(recorded_ones)}")
    benches, failed = parser.parse_args().benches, 0
    if unknown := set(benches) - set(recorded_ones):
        parser.error(
            f"no figures of {', '.join(sorted(unknown))} in {RESULTS}; there are {', '.join(recorded_ones)}"
        )
    for bench in benches or sorted(set(recorded_ones) - SWEEPS):
        recorded = json.loads((RESULTS / f"{bench}.json").read_text(encoding="utf-8"))
        failed += compared(bench, recorded, run(bench))
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
