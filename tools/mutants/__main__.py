"""Plants small faults one at a time and runs the tests that should notice: make mutants.

Ends with a line of JSON. planted: number of tried faults; killed_share: share that a test noticed by failing,
by exceeding the time limit, or by ending the process. A test counts only if it passes without the fault,
which is checked at the end. Faults that no test can notice are listed with reasons in
tools/mutants/aside.json and skipped. Exit code 3 if less than 0.95 were noticed, 1 if a test fails without a
fault.

--all FILE tries every fault once, the next --count of them at each call, and keeps the outcomes in FILE.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from mutants import aside, faults, noticing, pool
from mutants.faults import SOURCE, Fault
from mutants.journal import Journal
from mutants.pool import Outcome

WANTED = 0.95


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--count", type=int, default=60, help="number of faults (default: 60)")
    parser.add_argument(
        "--seed", type=_seed, default=0, help='seed of the selection, or "commit": its hash (default: 0)'
    )
    parser.add_argument("--all", type=Path, metavar="FILE", help="go on with a round over every fault")
    parser.add_argument("--lenient", action="store_true", help="list survivors, and do not fail for them")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATH[:LINE]",
        help="a file, a folder or a line; repeatable",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="parallel trials (default: one per processor)"
    )
    parser.add_argument(
        "--limit", type=float, default=60.0, metavar="SECONDS", help="time limit of one test (default: 60)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="time limit of one fault (default: 600)",
    )
    parser.add_argument("--list", action="store_true", help="list the faults without planting them")
    found = parser.parse_args(arguments)
    if min(found.count, found.jobs, found.limit, found.patience) <= 0:
        parser.error("--count, --jobs, --limit and --patience must be above 0")
    return found


def _seed(text: str) -> int:
    """Returns a seed, drawn from the hash of the commit for "commit": a sample that nobody chose."""
    if text != "commit":
        return int(text)
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=SOURCE)
    return int(found.stdout.strip()[:8] or "0", 16)


def drawn(
    found: list[Fault], given: argparse.Namespace, reasons: aside.Reasons
) -> tuple[list[Fault], list[Fault]]:
    """Returns the faults to plant, and the drawn faults that aside.json excludes."""
    wanted = drawn_from(found, given)
    plant: list[Fault] = []
    left: list[Fault] = []
    for fault in faults.sample(wanted, {f.file: noticing.area(f.file) for f in wanted}, given.seed):
        if len(plant) == given.count:
            break
        (left if fault.key in reasons else plant).append(fault)
    return plant, left


def drawn_from(found: list[Fault], given: argparse.Namespace) -> list[Fault]:
    """Returns the faults in the files, folders and lines of --only; all without it."""
    paths = [(noticing.files([path]), line) for path, _, line in (o.partition(":") for o in given.only)]
    return [
        f
        for f in found
        if not paths or any(f.file in files and line in ("", str(f.line)) for files, line in paths)
    ]


def main(arguments: list[str] | None = None) -> int:
    given = options(arguments)
    reasons = aside.load()
    found = [
        fault
        for file in noticing.files()
        for fault in faults.of(file, (SOURCE / file).read_text(encoding="utf-8"))
    ]
    if idle := aside.idle(reasons, found):
        print(
            "entries of tools/mutants/aside.json that match no fault; remove them:",
            *idle,
            sep="\n",
            file=sys.stderr,
        )
        return 2
    plant, left = drawn(found, given, reasons)
    if given.all is not None:
        return round_over(found, given, reasons)
    if not plant and not left:
        print(f"no faults found in {', '.join(given.only)}", file=sys.stderr)
        return 2
    if given.list:
        print(*plant, sep="\n")
        return 0
    return tried(plant, left, given, reasons)


def round_over(found: list[Fault], given: argparse.Namespace, reasons: aside.Reasons) -> int:
    """Tries the next faults of a round over all, lists the survivors so far, and returns the exit code."""
    journal = Journal(given.all)
    left = journal.left(drawn_from(found, given), reasons)
    code = tried(left[: given.count], [], given, reasons, journal) if left else 0
    for fault in journal.survivors(found, reasons):
        print(f"SURVIVED SO FAR {fault}")
    n, share = journal.share(found, reasons)
    todo = len(journal.left(found, reasons))
    print(json.dumps({"bench": "mutants", "tried": n, "left": todo, "killed_share": round(share, 4)}))
    return code


def tried(
    plant: list[Fault],
    left: list[Fault],
    given: argparse.Namespace,
    reasons: aside.Reasons,
    journal: Journal | None = None,
) -> int:
    """Plants the faults, prints the outcomes, and returns the exit code."""
    start, ended, interrupted = time.monotonic(), list[Outcome](), False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the trials end too
    for name in pool.LARGE:
        importlib.import_module(name)
    broken: list[str] = []
    try:
        for outcome in pool.outcomes(plant, jobs=given.jobs, limit=given.limit, patience=given.patience):
            ended.append(outcome)
            if journal is not None:
                journal.add(outcome)
            show(ended, len(plant))
        broken = pool.fail_anyway([o.test for o in ended if o.test], given.limit)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted; outcomes so far:", file=sys.stderr)
    for fault in left:
        print(f"set aside, {': '.join(reasons[fault.key])}\n{fault}")
    for outcome in ended:
        if outcome.how == "survived":
            print(f"SURVIVED {outcome.fault}")
    if broken:
        print("tests that fail without a fault and so prove nothing:", *broken, sep="\n")
    share = report(ended, left, given, reasons, time.monotonic() - start)
    if interrupted or broken:
        return 130 if interrupted else 1
    return 3 if share < WANTED and not given.lenient else 0


def show(ended: list[Outcome], of: int) -> None:
    """Prints the progress: one updated line on a terminal, else a line per fault."""
    last, survived = ended[-1], sum(o.how == "survived" for o in ended)
    if sys.stderr.isatty():
        bar, end = "#" * (30 * len(ended) // of), "\n" if len(ended) == of else ""
        print(
            f"\r[{bar:<30}] {len(ended)} of {of}, {survived} survived ", end=end, file=sys.stderr, flush=True
        )
    else:
        fault = last.fault
        by = f": {last.test}" if last.test else ""
        what = (
            f"{last.how} in {last.seconds:.0f} s: {fault.file}:{fault.line} {fault.operator} in"
            f" {fault.where}{by}"
        )
        print(f"{len(ended)} of {of} {what}", file=sys.stderr, flush=True)


def report(
    ended: list[Outcome], left: list[Fault], given: argparse.Namespace, reasons: aside.Reasons, seconds: float
) -> float:
    """Prints the line of JSON and returns the share of noticed faults."""
    how, kinds = Counter(o.how for o in ended), Counter(reasons[f.key][0] for f in left)
    planted, noticed = len(ended), len(ended) - how["survived"]
    share = noticed / planted if planted else 1.0
    figures = {
        "killed": noticed,
        "killed_by_timeout": how["hung"],
        "killed_by_crash": how["crashed"],
        "survived": how["survived"],
    }
    figures |= {**{kind: kinds[kind] for kind in aside.KINDS}, "seconds": round(seconds)}
    line = {
        "bench": "mutants",
        "seed": given.seed,
        "planted": planted,
        "killed_share": round(share, 4),
        "figures": figures,
    }
    print(json.dumps(line), flush=True)
    return share


if __name__ == "__main__":
    sys.exit(main())
