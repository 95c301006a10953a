"""Kills, damages, fills the disk, signals and races: make test-faults.

Runs tests/faults with every point instead of the sample of `make test`, and ends with a line of JSON: how
many faults of each kind were injected, and how many ended as they must. Exit code 1 if a test fails or a pair
differs.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# The figure of the injected faults of a kind, and that of the right endings.
FIGURES = {
    "kills": "kills_identical",
    "flips": "flips_found",
    "disk_full_cases": "disk_full_clean",
    "signals": "signals_right",
    "races": "races_right",
}


def main(arguments: list[str]) -> int:
    """Runs the tests, prints the line, and returns the exit code. arguments: for pytest."""
    os.environ["VENEER_FAULTS"] = "all"  # read by tests/support/tally.py
    sys.path.insert(0, str(TESTS))
    started = time.monotonic()
    code = int(pytest.main(["-q", *(arguments or [str(TESTS / "faults")])]))
    tally = importlib.import_module("support.tally")
    found = {name: tally.TRIED[name] for name in FIGURES}
    right = {name: tally.RIGHT[kind] for kind, name in FIGURES.items()}
    print(json.dumps(line({**found, **right, "seconds": round(time.monotonic() - started)})))
    return code or int(any(found[kind] != right[name] for kind, name in FIGURES.items()))


def line(figures: dict[str, int]) -> dict[str, object]:
    """Returns the record for bench/results/faults.json."""
    import torch

    from veneer.models import machine

    device = machine.hardware(torch.device("cpu"))
    return {"bench": "faults", "device": device, "versions": machine.versions(), "figures": figures}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
