"""Compares the predictions of `veneer plan` with `veneer fit`: memory, and seconds per step.

python bench/plan.py [--rounds 3] [--methods lora qlora]

Both run in processes of their own at the same time and take their steps in turns, one waiting while the other
computes, so that what else the machine does falls on both. Memory is the peak of the process in steps 3 to 6
over what it held when the model was loaded. Seconds are the processor's, of the probe as `plan` tells them
and of the run's steps but the first, as other programs slow wall time down by any factor; `wall_error` has
that too.

`qlora_part_.._error` are of bytes by part, as `plan` tells them without a probe: the tensors of another run
of that kind, of which weights are what is packed with its scales and all that is not, and activations what
autograd holds for the backward.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _measure as m
from _parts import parts, settings

METHODS = ("lora", "dora", "full", "qlora")

SETTINGS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from _parts import settings
"""
TURN = """
def turn():
    print("step", flush=True)
    sys.stdin.readline()
"""
FORETOLD = """
import json
from veneer.verbs.plan import probe as measure
from veneer.verbs.plan.plan import plan
timed = measure._timed
def in_turn(*given):
    turn()
    return timed(*given)
measure._timed = in_turn
found = plan(settings(sys.argv[1], sys.argv[2]), progress=False)
took = found.measured
print(json.dumps({"bytes": found.growth, "wall": took.seconds, "processor": took.processor_seconds}))
"""
REAL = """
import json, statistics, time
import torch
from veneer.analyse.cost import process_memory as resident
from veneer.runs import fit as app
from veneer.train.loop.step import Learner
cpu, loaded, steps = torch.device("cpu"), [], []
prepare, step = app.prepare, Learner.step
def prepared(*given, **more):
    found = prepare(*given, **more)
    loaded.append(resident.forget_peak(cpu))
    return found
def watched(self, *given):
    turn()
    resident.forget_peak(cpu)
    started = time.monotonic(), time.process_time()
    found = step(self, *given)
    steps.append((time.monotonic() - started[0], time.process_time() - started[1], resident.peak(cpu)))
    return found
app.prepare, Learner.step = prepared, watched
app.fit(settings(sys.argv[1], sys.argv[2]), progress=False)
walls, processor, peaks = zip(*steps)
middle = lambda times: statistics.median(times[1:])
used = max(peaks[2:6]) - loaded[0]
print(json.dumps({"bytes": used, "wall": middle(walls), "processor": middle(processor)}))
"""


class Program:
    """A program of its own that says when it is about to take a step, and waits until it may."""

    def __init__(self, code: str, method: str, out: str) -> None:
        command = [sys.executable, "-c", SETTINGS + TURN + code, method, out]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.line = self._read()

    def step(self) -> None:
        """Lets it take a step, and waits until it has, and is about to take the next one or is done."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        self.line = self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip() or sys.exit("a program ended without a figure")


def in_turns(*programs: Program) -> list[dict[str, float]]:
    """Returns the last lines that the programs print."""
    while waiting := [p for p in programs if p.line == "step"]:
        for program in waiting:
            program.step()
    return [json.loads(p.line) for p in programs]


def measure(method: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Foretold and real, medians of the rounds, by figure."""
    pairs: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            pairs.append(
                in_turns(Program(FORETOLD, method, f"{folder}/plan"), Program(REAL, method, f"{folder}/{i}"))
            )
            print(method, *pairs[-1], file=sys.stderr, flush=True)
    first = pairs[0][0]
    return {
        name: (statistics.median(p[name] for p, _ in pairs), statistics.median(r[name] for _, r in pairs))
        for name in first
    }


def of_parts(method: str) -> dict[str, float]:
    """Returns bytes of each part, and by what share the forecast of each is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = parts(settings(method, f"{folder}/run"))
    print(
        method,
        {part: f"{foretold:,} for {real:,}" for part, (foretold, real) in pairs.items()},
        file=sys.stderr,
        flush=True,
    )
    errors = {part: abs(foretold - real) / real for part, (foretold, real) in pairs.items()}
    figures: dict[str, float] = {f"{method}_part_{part}_bytes": real for part, (_, real) in pairs.items()}
    return {
        **figures,
        **{f"{method}_part_{part}_error": e for part, e in errors.items()},
        f"{method}_part_error_max": max(errors.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    given = parser.parse_args()
    figures: dict[str, float] = {}
    for method in given.methods:
        for name, (foretold, real) in measure(method, given.rounds).items():
            figures[f"{method}_{name}"] = real
            figures[f"{method}_{name}_error"] = abs(foretold - real) / real
    for name, what in {"memory": "bytes", "time": "processor", "wall": "wall"}.items():
        figures[f"{name}_error"] = max(figures[f"{method}_{what}_error"] for method in given.methods)
    if "qlora" in given.methods:
        figures |= of_parts("qlora")
    m.report("plan", figures)


if __name__ == "__main__":
    main()
