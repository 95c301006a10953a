"""Runs trials of many faults in parallel, with a time limit for each test."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from mutants import noticing, trial
from mutants.faults import Fault

# Imported once, because the trials are forks of this process.
LARGE = (
    "torch",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "peft",
    "hypothesis.strategies",
    "pytest",
)


class Outcome(NamedTuple):
    """Outcome of a trial.

    how: failed, hung (a test exceeded the limit), crashed or survived. test: the one that noticed, or its
    file.
    """

    fault: Fault
    how: str
    seconds: float
    test: str = ""


@dataclass
class Trial:
    """A process that runs tests; `test` is the current one, or "" before the first."""

    process: BaseProcess
    results: Connection
    folder: tempfile.TemporaryDirectory[str]
    limit: float
    test: str = ""
    failed: list[str] = field(default_factory=list)
    code: int | None = None

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.until = self.began + self.limit

    @classmethod
    def start(
        cls, fault: Fault | None, tests: Sequence[str], limit: float, wanted: Sequence[str] = ()
    ) -> Trial:
        folder = tempfile.TemporaryDirectory(prefix="mutants-")
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=trial.run, args=(there, fault, tests, wanted, folder.name))
        process.start()
        there.close()
        return cls(process, here, folder, limit)

    def listen(self) -> bool:
        """Reads the messages of the process; returns True if the process has ended."""
        try:
            while self.results.poll():
                word, text = self.results.recv()
                self.until = time.monotonic() + self.limit
                if word == "begins":
                    self.test = text
                elif word == "failed":
                    self.failed.append(text)
                else:
                    self.code = int(text)
        except EOFError:
            return True
        return False

    def end(self) -> None:
        """Stops the process and its children, and removes their files."""
        for stop in (lambda: os.killpg(self.process.ident or 0, signal.SIGKILL), self.process.kill):
            try:
                stop()
            except (ProcessLookupError, PermissionError):  # the process has ended, or has no group yet
                continue
        self.process.join()
        self.results.close()
        self.folder.cleanup()


def outcomes(
    faults: Sequence[Fault], *, jobs: int, limit: float, patience: float = math.inf
) -> Iterator[Outcome]:
    """Yields the outcome of each fault when its trial ends.

    limit: seconds per test. patience: seconds per fault; an unnoticed fault then counts as survived.
    """
    left, running = list(reversed(faults)), dict[int, tuple[Fault, Trial]]()
    try:
        while left or running:
            while left and len(running) < jobs:
                fault = left.pop()
                trial = Trial.start(fault, noticing.tests(fault.file, fault.where), limit)
                running[id(trial)] = fault, trial
            wait([t.results for _, t in running.values()], timeout=1.0)
            for fault, trial in list(running.values()):
                outcome = _outcome(fault, trial, patience)
                if outcome is not None:
                    running.pop(id(trial))[1].end()
                    yield outcome
    finally:
        for _, trial in running.values():
            trial.end()


def _outcome(fault: Fault, trial: Trial, patience: float) -> Outcome | None:
    """Returns the outcome of the fault, or None while its tests run."""
    ended, now = trial.listen(), time.monotonic()
    seconds, at = now - trial.began, trial.test or noticing.tests(fault.file, fault.where)[0]
    if trial.failed:
        return Outcome(fault, "failed", seconds, trial.failed[0])
    if trial.code == 0:
        return Outcome(fault, "survived", seconds)
    if ended or trial.code is not None:
        return Outcome(fault, "crashed", seconds, at)
    if now > trial.until:
        return Outcome(fault, "hung", seconds, at)
    return Outcome(fault, "survived", seconds) if seconds > patience else None


def fail_anyway(tests: Sequence[str], limit: float) -> list[str]:
    """Returns the tests that fail, or exceed the limit, without a fault."""
    files = sorted({t.partition("::")[0] for t in tests})
    if not files:
        return []
    check = Trial.start(None, files, limit, tests)
    try:
        while not check.listen():
            if time.monotonic() > check.until:
                return [*check.failed, check.test]
            wait([check.results], timeout=1.0)
        return check.failed or ([] if check.code in (0, 5) else [check.test])
    finally:
        check.end()
