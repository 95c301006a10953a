"""Chooses the tests for a fault: those of the file's name, then those of the first matching row."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mutants import nearness
from mutants.faults import ROOT, SOURCE, Fault
from mutants.nearness import TESTS

AREAS = ("methods", "optim", "adapt")
# The first row that matches a file of src/veneer names its tests (test_NAME.py), the slowest last. Every file
# has those of its own name without a row. They come first, then those with most words of the faulty function.
# Processes started by tests run without the fault.
ROWS = {
    "methods/base/token_rows.py": "tokens* beside",
    "methods/inits/*": "start* option_limits methods complaints_settings interchange quant",
    "methods/*": (
        "ia3* prefix* flora* gains* frozen miss* optim fourierft* baselines* peft_kinds peft_forms* start*"
        " counts moving_base complaints* option_limits quant methods interchange"
    ),
    "optim/*": "optim lowrank* option_limits optimisers* lorapro* scratch* complaints_settings",
    "adapt/banks/bank.py": "gains* flora* bank* complaints*",
    "adapt/banks/members.py": "gains* flora* bank* complaints*",
    "adapt/banks/rows.py": "gains* flora* bank* complaints*",
    "adapt/banks/s*.py": "gains* segments*",
    "adapt/banks/program.py": "gains* segments*",
    "adapt/banks/*": "bank* gains* flora* segments* experts_bank complaints*",
    "adapt/acting/bare.py": "experts*",
    "adapt/acting/changed.py": "experts*",
    "adapt/acting/groups.py": "bare experts*",
    "adapt/acting/*": "acting bare gains* attach* shared_inputs* whole* recomputation* calls* experts*",
    "adapt/tokens/*": "tokens* beside store interchange complaints*",
    "adapt/peft/per_expert.py": "experts_peft peft_parts expert_files experts interchange",
    "adapt/peft/parameters.py": "expert_files experts_peft peft_parts interchange",
    "adapt/calibrate.py": "start* complaints*",
    "adapt/peft/*": (
        "beside interchange peft_* experts_peft tokens* miss* fourierft* frozen prefix* store"
        " complaints* verify start*"
    ),
    "adapt/attach*": (
        "attach* calls merge* gains* combine* prefix* baselines* store complaints* quant shared_inputs*"
        " methods experts families"
    ),
    "adapt/merge.py": "merge* verdict gains* combine* prefix* baselines* complaints* quant methods",
    "adapt/banks/entries.py": "bank*",
    "tasks/head.py": "chunked* store interchange",
    "adapt/store/fingerprint.py": "store* beside quant interchange verify complaints*",
    "adapt/*": (
        "calls* probe* sums calibrate* beside* roles* whole* draws* own* loaded* merge* combine* attach*"
        " store* prefix* frozen complaints* interchange verify moving_base changed_bases start* quant methods"
    ),
}
SHARED = ("__init__", "lora", "kaiming")  # files in methods that other files use, as those in base
NEAREST = 3  # test files that run after those of the row
# Folders of tests of the tree, of fetched models, or that start processes.
FAR = ("project", "real", "cli", "runs", "faults", "search", "verbs", "embedded", "integrations")
COSTLY = "compil"  # in the name of a test that compiles: slow, and seldom the only one to notice a fault


def area(file: str) -> str:
    """Returns the area of a file under src/veneer."""
    return Path(file).parts[0]


def files(only: Iterable[str] = ()) -> list[str]:
    """Returns the files for faults, relative to src/veneer; only: wanted beginnings of paths."""
    found = sorted(p.relative_to(SOURCE).as_posix() for a in AREAS for p in (SOURCE / a).rglob("*.py"))
    wanted = [name.removeprefix("src/veneer/").rstrip("/") for name in only]
    return [f for f in found if not wanted or any(f == w or f.startswith(f"{w}/") for w in wanted)]


def tests(file: str, where: str = "") -> list[str]:
    """Returns the test files for a function of a file under src/veneer: its own first, then the nearest."""
    path = Path(file)
    stem = path.parent.name if path.stem == "__init__" else path.stem
    own = [p for name in (stem, f"{stem}_*") for p in sorted((TESTS / area(file)).glob(f"test_{name}.py"))]
    row = next(names.split() for pattern, names in ROWS.items() if fnmatch(file, pattern))
    listed = [*own, *(p for name in row for p in sorted(TESTS.rglob(f"test_{name}.py")))]
    first = {p.relative_to(ROOT).as_posix() for p in own}
    near = functools.partial(nearness.of_file, file, where)
    others = sorted((t for t in nearness.words_of_tests() if Path(t).parts[1] not in FAR), key=near)
    found = dict.fromkeys(p.relative_to(ROOT).as_posix() for p in listed)
    late = {test: i / len(found) for i, test in enumerate(found)}  # of a row's order, the slowest last
    ordered = sorted(found, key=lambda t: (t not in first, -near(t) * (1 - late[t])))
    return [*ordered, *(t for t in others[-NEAREST:] if t not in found)]


def concerns(file: str, test: str) -> bool:
    """Returns True if a test may concern a file; tests of a method have its name in their name or file."""
    path, (module, _, _) = Path(file), test.partition("::")
    shared = path.parts[0] != "methods" or path.stem in SHARED or path.parent.name == "base"
    return shared or path.stem in test or _names(module, path.stem)


@functools.cache
def _names(test_file: str, stem: str) -> bool:
    return re.search(rf"\b{stem}\b", (ROOT / test_file).read_text(encoding="utf-8")) is not None


def place(fault: Fault, test: str, function: Callable[..., Any] | None = None) -> tuple[bool, float]:
    """Returns a sort key for tests: compiling ones last, else by words shared with file and function."""
    shared = _words(Path(fault.file).stem, fault.where) & _words(test.partition("::")[2])
    text = 0.0 if function is None else nearness.of_test(fault.file, fault.where, function)
    return COSTLY in test, -len(shared) - text


def _words(*names: str) -> set[str]:
    return {w.lower() for name in names for w in re.findall(r"[A-Z]*[a-z]+|[A-Z]+", name) if len(w) > 2}
