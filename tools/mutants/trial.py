"""Runs tests in a process with one fault, planted while its module is imported; files stay unchanged."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from mutants import faults, noticing
from mutants.faults import ROOT, SOURCE, Fault

MEMORY = 16 << 30  # bytes; a fault that fills the memory must not stop the machine


class Planter(MetaPathFinder, Loader):
    """Imports the module of the fault from its changed source."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.path = fault, SOURCE / fault.file
        self.name = ".".join(["veneer", *fault.file.removesuffix(".py").removesuffix("/__init__").split("/")])

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        inside = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return spec_from_file_location(fullname, self.path, loader=self, submodule_search_locations=inside)

    def exec_module(self, module: ModuleType) -> None:
        tree = faults.plant(self.path.read_text(encoding="utf-8"), self.fault)
        exec(compile(tree, str(self.path), "exec"), vars(module))


class Watcher:
    """A pytest plugin: reports starting and failing tests, and runs the tests nearest to the fault first."""

    def __init__(self, say: Callable[[str, str], None], fault: Fault | None, wanted: Sequence[str]) -> None:
        self.say, self.fault, self.wanted = say, fault, frozenset(wanted)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        fault = self.fault
        if fault is not None:
            kept: list[Any] = [i for i in items if noticing.concerns(fault.file, i.nodeid)]
            kept.sort(key=lambda i: noticing.place(fault, i.nodeid, getattr(i, "function", None)))
            items[:] = kept
        else:
            items[:] = [item for item in items if item.nodeid in self.wanted]

    def pytest_collectreport(self, report: object) -> None:
        self._tell(report)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say("begins", nodeid)

    def pytest_runtest_logreport(self, report: object) -> None:
        self._tell(report)

    def _tell(self, report: object) -> None:
        if report.failed:  # type: ignore[attr-defined]
            self.say("failed", report.nodeid)  # type: ignore[attr-defined]


def run(
    results: Connection, fault: Fault | None, tests: Sequence[str], wanted: Sequence[str], folder: str
) -> None:
    """Runs the test files up to the first failure; without a fault, runs all `wanted` tests in them.

    folder: for files of the tests.
    """
    os.setsid()  # children of tests end with them, and Ctrl-C reaches the parent only
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.chdir(ROOT)
    sys.path.insert(0, str(SOURCE.parent))
    if fault is not None:
        sys.meta_path.insert(0, Planter(fault))
    import hypothesis
    import pytest

    hypothesis.settings.register_profile("mutants", database=None, derandomize=True)
    hypothesis.settings.load_profile("mutants")
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--basetemp={folder}/tmp",
        *(["-x"] if fault else []),
    ]
    watcher = Watcher(lambda *said: results.send(said), fault, wanted)
    # File by file: collecting all files takes longer than most trials.
    codes = [int(pytest.main([*options, test], [watcher])) for test in tests]
    results.send(
        ("done", str(max((code for code in codes if code != pytest.ExitCode.NO_TESTS_COLLECTED), default=0)))
    )
