"""SIGTERM, SIGINT and SIGHUP end a command at once or after a step, saved; a second one ends anything."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen, run
from typing import Any

import pytest
import torch
from support import tally, tiny
from support.fresh import SOURCE
from support.resuming import assert_same

from veneer.runs.fit import fit
from veneer.train.run import Run
from veneer.train.speed import compiling

SHORT = {"steps": 6, "eval_every": 3, "save_every": 2}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}

# Sends a signal to itself as it imports a module, the first of many moments.
PROGRAM = """
import os, signal, sys
module, number, *arguments = sys.argv[1:]
def see(event, args):
    if event == "import" and args[0] == module and not sent:
        sent.append(1)
        os.kill(os.getpid(), int(number))
sent = []
sys.addaudithook(see)
from veneer.__main__ import main
sys.argv[1:] = arguments
sys.exit(main())
"""
MOMENTS = ("veneer.cli.frame", *tally.few(["torch", "typer", "veneer.cli.app", "veneer.runs.fit"]))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("signals")


@pytest.fixture(scope="module")
def whole(place) -> Path:
    fit(Run.from_dict(tiny.settings(place, **SHORT, out=str(place / "whole"))), progress=False)
    return place / "whole"


@pytest.fixture
def given(place, tmp_path) -> dict[str, Any]:
    return tiny.settings(place, **SHORT, out=str(tmp_path / "run"))


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


@pytest.mark.parametrize(
    ("moment", "number"),
    [("veneer.cli.frame", n) for n in CODES]
    + [(m, n) for m in MOMENTS[1:] for n in tally.few([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])],
)
def test_from_the_first_moment_on_a_signal_ends_with_a_line_and_its_code(tmp_path, moment, number):
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        moment,
        str(int(number)),
        "fit",
        "--data",
        "no.txt",
        "--out",
        "x",
    ]
    with tally.one("signals"):
        done = run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
        assert done.returncode == CODES[number], done.stderr
        assert done.stderr.startswith("stopped") and "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As SIGHUP under nohup."""
    command = [sys.executable, "-c", PROGRAM, "veneer.cli.frame", str(int(signal.SIGHUP)), "--version"]
    with tally.one("signals"):
        done = run(
            command,
            capture_output=True,
            text=True,
            env=environment(),
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        )
        assert done.returncode == 0 and done.stdout.startswith("veneer ")


@pytest.mark.parametrize("number", CODES, ids=lambda n: n.name)
@pytest.mark.parametrize("step", tally.few([3, 1, 6]))
def test_a_signal_in_a_step_saves_it(given, whole, number, step):
    with tally.one("signals"):
        assert tiny.train(given, signal_at=(step, number)) == CODES[number]
        assert (Path(given["out"]) / "checkpoints" / f"step-{step:06d}").is_dir()
        fit(Run.from_dict({**given, "resume": True}), progress=False)
        assert_same(given, whole)


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGINT)], ids=str
)
def test_a_second_signal_of_any_kind_ends_at_once(given, whole, first, second):
    """Both within one step: the process dies by the second, before the step's end is saved."""
    with tally.one("signals"):
        assert tiny.train(given, signal_at=(3, first), then=second) == -second
        assert not (Path(given["out"]) / "checkpoints" / "step-000003").exists()
        fit(Run.from_dict({**given, "resume": True}), progress=False)
        assert_same(given, whole)


@pytest.mark.parametrize("number", CODES, ids=lambda n: n.name)
def test_in_the_compilation_of_a_step_a_signal_acts_at_once(given, whole, number):
    """The step is not finished, but undone: random numbers and rows are drawn again after the resume."""
    given |= {"stream": True, "buffer": 4}
    reference = {**given, "out": str(Path(given["out"]).parent / "reference")}
    fit(Run.from_dict(reference), progress=False)
    with tally.one("signals"):
        assert tiny.train(given, signal_at=(4, number), compiling=True) == CODES[number]
        kept = sorted(p.name for p in (Path(given["out"]) / "checkpoints").iterdir())
        assert kept[-1] == "step-000003"
        fit(Run.from_dict({**given, "resume": True}), progress=False)
        assert_same(given, Path(reference["out"]))


@pytest.mark.skipif(compiling.missing(torch.device("cpu")) is not None, reason="needs a compiler")
@pytest.mark.skipif(not tally.FULL, reason="takes half a minute: make test-faults")
def test_in_a_real_compilation_before_the_training_a_signal_acts_at_once(given, tmp_path):
    cache = tmp_path / "cache"
    flags = {k: given[k] for k in ("model", "data", "valid", "out", "lr", "steps", "length", "batch")}
    words = [word for k, v in flags.items() for word in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "veneer", "fit", *words, "--compile", "on", "--no-report"]
    kept = {**environment(), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    with tally.one("signals"), Popen(command, stderr=PIPE, text=True, env=kept) as process:
        while process.poll() is None and not any(cache.rglob("*.cpp")):
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        assert process.wait(60) == 143
        assert "Traceback" not in process.stderr.read()
        assert time.monotonic() - sent < 30  # the compilation takes longer than that on a busy machine
    assert not (Path(given["out"]) / "checkpoints").exists()
