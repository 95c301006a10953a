"""Times a comparison: eight trials as one bank against eight runs, and halving against trials in full.

    OMP_NUM_THREADS=1 python bench/compare.py [bank search] [--write]

The built-in model on English prose; seconds are the processor's, of one thread, so that other work on the
machine counts little. `bank_step_ratio`: a step of eight LoRA trainings in one pass over eight steps alone.
`bank_time_ratio`: the same from the call to the results, with loading and evaluations, over eight `fit`.
`bank_memory_ratio`: bytes of the one process over those of eight at once. Nothing is compiled: trainings this
short are over before a compilation pays. `search_time_ratio`: a search over 24 trials (LoRA at ranks 4, 8 and
16, eight rates each) with halving and passes over 24 `fit` in full; `search_same_winner` is 1 if both find
the same trial, or one inside its interval over three seeds. --write puts the line into
bench/results/compare.json; parts that were not run stay as they were.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import _measure as m
import torch

from veneer.adapt.banks.bank import Bank
from veneer.models import machine
from veneer.ops.intervals import of_mean
from veneer.runs.fit import begin, fit, look, loop_of
from veneer.runs.fit_many import fit_many, fit_many_until
from veneer.runs.prepare import NAME
from veneer.search.compare.training import Training
from veneer.search.decide import grid
from veneer.search.decide.choose import halve
from veneer.search.decide.trial import Trial
from veneer.train.errors import Diverged
from veneer.train.loop import together
from veneer.train.loop.loop import Loop
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

RESULTS = Path(__file__).parent / "results" / "compare.json"
WORK = Path("runs") / "bench_compare"
TRIALS, SKIPPED = 8, 3  # steps that warm up
STEPS = {"bank": 32, "search": 96}
RANKS, RATES, SEEDS = (4, 8, 16), 8, 3


def run(name: str, **changed: Any) -> Run:
    """Returns a run of the built-in model in a folder of its own."""
    own = {"data": ("builtin:prose",), "batch": 1, "length": 128, "eval_windows": 2, "report": False}
    own |= {"options": {"rank": 8}, "resume": True, "compile": "off", "out": str(WORK / name), "lr": 5e-3}
    return Run.from_dict({**own, **changed})


def bank() -> dict[str, float]:
    """Times eight trainings and their steps, and counts the bytes of their tensors."""
    shutil.rmtree(WORK, ignore_errors=True)
    shared = {"steps": STEPS["bank"], "eval_every": STEPS["bank"], "length": 64}
    fit(run("first", **{**shared, "steps": 1, "eval_every": 1}), progress=False)  # imports are not counted
    rates = grid.around(5e-3, TRIALS)
    begun = time.process_time()
    fit_many([run(f"bank-{r:g}", lr=r, **shared) for r in rates], progress=False)
    at_once = time.process_time() - begun
    begun = time.process_time()
    for rate in rates:
        fit(run(f"alone-{rate:g}", lr=rate, **shared), progress=False)
    alone = time.process_time() - begun
    step, steps = _steps(shared, rates)
    print(f"eight at once {at_once:.1f} s, one by one {alone:.1f} s; steps {step:.3f} and {steps:.3f} s")
    ratios = {"bank_time_ratio": at_once / alone, "bank_step_ratio": step / steps}
    return {**ratios, "bank_memory_ratio": _memory(rates)}


def _steps(shared: dict[str, Any], rates: Sequence[float]) -> tuple[float, float]:
    """Returns the median seconds of a step of all trainings in one pass, and of eight steps alone."""
    with ExitStack() as stack:
        voice = Voice(False)
        readies = [look(run(f"step-{r:g}", lr=r, **shared), voice, stack) for r in rates]
        together.share_base([ready.model for ready in readies])
        loops = [loop_of(begin(ready, voice, stack)) for ready in readies]
        bank = together.carry([ready.model for ready in readies], NAME)
        return (
            _median(loops, lambda: _one_pass(bank, loops)),
            TRIALS * _median(loops[:1], lambda: loops[0].learner.step(*loops[0].due())),
        )


def _one_pass(bank: Bank, loops: Sequence[Loop]) -> None:
    together.step(bank, [together.Due(i + 1, loop.learner, *loop.due()) for i, loop in enumerate(loops)])


def _median(loops: Sequence[Loop], act: Callable[[], Any]) -> float:
    """Returns the median seconds of an act that makes a step of each loop, without the first ones."""
    found = []
    for _ in range(SKIPPED + STEPS["bank"] // 4):
        begun = time.process_time()
        act()
        found.append(time.process_time() - begun)
        for loop in loops:
            loop.position.step += 1
    return statistics.median(found[SKIPPED:])


def _memory(rates: Sequence[float]) -> float:
    """Returns peak bytes of a process with eight trainings in one pass over eight processes with one each."""
    import multiprocessing

    peaks = []
    for some in (list(rates), list(rates[:1])):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(_peak, (some,)))
    together, one = peaks
    return together / (len(rates) * one)


def _peak(rates: Sequence[float]) -> int:
    """Returns the bytes that trainings take at their peak over the process before them."""
    from veneer.analyse.cost import process_memory

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    held = process_memory.forget_peak(cpu) or 0
    runs = [run(f"peak-{len(rates)}-{r:g}", lr=r, steps=3, eval_every=1000) for r in rates]
    fit_many_until(runs, 3)
    return (process_memory.peak(cpu) or 0) - held


def search() -> dict[str, float]:
    """Times a search over 24 trials, and the same trials in full."""
    shutil.rmtree(WORK, ignore_errors=True)
    steps = STEPS["search"]
    runs = {f"r{r}": run(f"r{r}", options={"rank": r}, steps=steps) for r in RANKS}
    rates = grid.around(5e-3, RATES)
    pool = [Trial(label, rate) for label in runs for rate in rates]
    quick = Training(runs, steps, WORK / "halving", Voice(True), 8)
    fit(run("first", steps=1, eval_every=1), progress=False)  # imports are not counted
    begun, wall = time.process_time(), time.monotonic()
    tried = halve(quick, {"all": pool})["all"]
    halving = time.process_time() - begun
    took = time.monotonic() - wall
    winner = min((t for t in tried if not t.dropped), key=lambda t: t.progress.best(quick.metric)).trial
    whole = Training(runs, steps, WORK / "whole", Voice(True), 1)
    begun, wall = time.process_time(), time.monotonic()
    full = {trial: _in_full(whole, trial) for trial in pool}
    one_by_one = time.process_time() - begun
    print(f"wall: halving {took:.0f} s, in full {time.monotonic() - wall:.0f} s", file=sys.stderr)
    best = min(pool, key=lambda t: full[t])
    spread = of_mean([full[best], *(_in_full(whole, best._replace(seed=s)) for s in range(1, SEEDS))])
    inside = winner == best or full[winner] <= (spread.high or 0.0)
    print(f"halving {halving:.0f} s: {winner.key}; in full {one_by_one:.0f} s: {best.key}", file=sys.stderr)
    return {"search_time_ratio": halving / one_by_one, "search_same_winner": float(inside)}


def _in_full(training: Training, trial: Trial) -> float:
    """Returns the cost of a trial that `fit` trains, infinite if it diverges."""
    try:
        result = fit(training.run_of(trial), progress=False)
    except Diverged:
        return math.inf
    return training.metric.cost(result.metrics["after"]["valid"])


PARTS = {"bank": bank, "search": search}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="default: all")
    parser.add_argument("--write", action="store_true", help="keep the outcome in bench/results")
    args = parser.parse_args()
    figures = json.loads(RESULTS.read_text())["figures"] if RESULTS.exists() else {}
    device = machine.hardware(torch.device("cpu"))
    for part in args.parts or PARTS:  # each is kept once it is measured
        figures |= {name: float(f"{value:.4g}") for name, value in PARTS[part]().items()}
        line = {"bench": "compare", "device": device, "versions": m.versions(), "figures": figures}
        if args.write:
            RESULTS.write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
