"""After a fault in one of several processes all end alike, and the run resumes to the same bits."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import tally, tiny
from support.launched import Fault, launch
from support.resuming import assert_same
from support.torchrun import torchrun

SHORT = {"steps": 6, "eval_every": 3, "save_every": 2, "report": False}
SIZES = tally.few([2, 4])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def wholes() -> dict[int, Path]:
    return {}


def given(place: Path, out: Path, **changed: Any) -> dict[str, Any]:
    return tiny.settings(place, **{**SHORT, "batch": 4, "accumulate": 2, "out": str(out), **changed})


def whole(place: Path, wholes: dict[int, Path], size: int) -> Path:
    """The folder of an uninterrupted training in so many processes: their dropouts differ by their number."""
    if size not in wholes:
        wholes[size] = place / f"whole-{size}"
        assert [e.code for e in launch(given(place, wholes[size]), size)] == [0] * size
    return wholes[size]


def kept(settings: dict[str, Any]) -> list[str]:
    return sorted(p.name for p in (Path(settings["out"]) / "checkpoints").iterdir())


@pytest.mark.parametrize("within", tally.few([True, False]))
@pytest.mark.parametrize("size", SIZES)
def test_a_signal_to_one_process_saves_at_the_same_step_in_all(place, wholes, tmp_path, size, within):
    own, reference = given(place, tmp_path / "run"), whole(place, wholes, size)
    with tally.one("signals"):
        ended = launch(own, size, fault=Fault(size - 1, signal.SIGTERM, step=3, within=within))
        assert [e.code for e in ended] == [143] * size, ended
        assert all("after step 3 of 6; saved" in e.said for e in ended)
        assert max(e.seconds for e in ended) <= 30  # torchrun's patience
        assert kept(own)[-1] == "step-000003"
        assert [e.code for e in launch({**own, "resume": True}, size)] == [0] * size
        assert_same(own, reference)


@pytest.mark.parametrize("rank", tally.few([1, 0]))
@pytest.mark.parametrize("size", SIZES)
def test_after_a_kill_of_one_the_others_end_and_a_restart_resumes(place, wholes, tmp_path, size, rank):
    own, reference = given(place, tmp_path / "run"), whole(place, wholes, size)
    with tally.one("kills"):
        ended = launch(own, size, fault=Fault(rank, signal.SIGKILL, step=5, within=True))
        assert ended.pop(rank).code == -signal.SIGKILL
        assert [e.code for e in ended] == [1] * (size - 1)
        assert any("another process ended" in e.said for e in ended), ended
        assert max(e.seconds for e in ended) <= 30
        # As torchrun with --max-restarts starts all of them again: with the same settings.
        assert [e.code for e in launch(own, size, restarts=1)] == [0] * size
        assert_same(own, reference)


def test_kills_at_random_times_leave_the_loss_curve(place, wholes, tmp_path):
    """Every kill hits one of two processes at a random time; whatever comes to its end has the same bits."""
    own, draw = given(place, tmp_path / "run"), random.Random(0)
    reference, killed, starts = whole(place, wholes, 2), 0, 0
    while killed < (20 if tally.FULL else 2):
        fault = Fault(draw.randrange(2), signal.SIGKILL, seconds=draw.uniform(0.01, 0.25))
        codes = [e.code for e in launch(own, fault=fault, restarts=starts)]
        starts += 1
        if codes == [0, 0]:  # before the kill
            assert_same(own, reference)
            shutil.rmtree(own["out"])
            continue
        with tally.one("kills"):
            assert codes[fault.rank] == -signal.SIGKILL and codes[1 - fault.rank] in (0, 1)
        killed += 1
    assert [e.code for e in launch(own, restarts=starts)] == [0, 0]
    assert_same(own, reference)


@pytest.mark.parametrize("size", SIZES)
def test_a_hung_process_is_named_by_the_others_within_the_timeout(place, tmp_path, size):
    own, timeout = given(place, tmp_path / "run"), 4.0 if size == 2 else 20.0
    ended = launch(own, size, fault=Fault(1, signal.SIGSTOP, step=2, within=True), timeout=timeout)
    ended.pop(1)
    assert [e.code for e in ended] == [1] * (size - 1)
    for e in ended:
        assert re.search(r"the sum of (counts|tensors) failed: process 1 hung for \d+ s", e.said), e.said


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_nan_in_one_process_is_skipped_by_all_and_counted(place, tmp_path, two, what):
    own = given(place, tmp_path / "run", options={"rank": 4})
    every = two.call("support.shared_runs:with_nan", own, 1, [3, 5], what)
    for steps in every:
        assert [s["skipped"] for s in steps] == [
            f"{what} is nan" if i in (3, 5) else None for i in range(1, 7)
        ]
        assert all((s["before"] == s["after"]) == (s["skipped"] is not None) for s in steps)
    assert [s["after"] for s in every[0]] == [s["after"] for s in every[1]]
    lines = [line for line in tiny.metrics(tmp_path / "run") if "lr" in line]
    assert [line["step"] for line in lines if line.get("skipped")] == [3, 5]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["skipped_steps"] == 2


def test_nan_in_one_process_step_after_step_ends_all_with_a_checkpoint(place, tmp_path, two):
    own = given(place, tmp_path / "run", options={"rank": 4}, steps=9)
    with pytest.raises(AssertionError, match="Diverged: 5 steps in a row were skipped, the last, step 7"):
        two.call("support.shared_runs:with_nan", own, 1, [3, 4, 5, 6, 7], "loss")
    assert kept(own)[-1] == "step-000007"


@pytest.mark.parametrize("where", tally.few(["parameter", "exp_avg"]))
def test_a_flipped_bit_in_one_process_is_seen_before_the_next_checkpoint(place, tmp_path, two, where):
    own = given(place, tmp_path / "run", options={"rank": 4}, eval_every=9)
    prefix = "p." if where == "parameter" else "o."
    for error in two.call("support.shared_runs:diverged", own, 1, 4, where):
        assert re.match(
            rf"after step 4 process 1 holds other numbers than process 0 in 1 of \d+ tensors: {prefix}"
            r"model\S+; nothing of this step is saved. Check the memory of its machine, then go on from"
            r" step-000002 with resume=True",
            error,
        ), error
    assert kept(own) == ["step-000002"]
    assert two.call("support.shared_runs:diverged", {**own, "resume": True}, 1, 99, where) == ["", ""]
    whole = given(place, tmp_path / "whole", options={"rank": 4}, eval_every=9)
    assert two.call("support.shared_runs:diverged", whole, 1, 99, where) == ["", ""]
    assert_same(own, tmp_path / "whole")


def test_a_signal_while_the_processes_agree_stops_all_a_step_later(place, tmp_path, two):
    own = given(place, tmp_path / "run", options={"rank": 4}, eval_every=9)
    for end in two.call("support.shared_runs:signalled", own, 1, 3):
        assert "stopped by signal 15 after step 3 of 6; saved" in end
    assert kept(own)[-1] == "step-000003"


needs_all = pytest.mark.skipif(not tally.FULL, reason="starts torchrun: make test-faults")


def started(own: dict[str, Any], *launcher: str) -> Any:
    """Starts torchrun; returns it once its training has made three steps, with the processes by rank."""
    process = torchrun(own, *launcher)
    metrics, ranks = Path(own["out"]) / "metrics.jsonl", {}
    while not (metrics.exists() and metrics.read_text().count("gradient_norm") >= 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "RANK" in (found := child.environ()):
            ranks[int(found["RANK"])] = child
    return process, ranks


@needs_all
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_after_a_kill_to_the_same_bits(place, wholes, tmp_path, rank):
    own = given(place, tmp_path / "run", steps=60, save_every=10)
    reference = {**own, "out": str(tmp_path / "whole")}
    assert [e.code for e in launch(reference)] == [0, 0]
    with tally.one("kills"):
        process, ranks = started(own, "--max-restarts", "2")
        ranks[rank].kill()
        said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert_same(own, tmp_path / "whole")


@needs_all
@pytest.mark.parametrize("to", ["torchrun", "0", "1"])
def test_sigterm_under_torchrun_saves_at_one_step(place, tmp_path, to):
    own = given(place, tmp_path / "run", steps=60, save_every=50)
    reference = {**own, "out": str(tmp_path / "whole")}
    assert [e.code for e in launch(reference)] == [0, 0]
    with tally.one("signals"):
        process, ranks = started(own)
        (process if to == "torchrun" else ranks[int(to)]).send_signal(signal.SIGTERM)
        sent = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - sent < 30  # then torchrun kills
        assert len(set(re.findall(r"after step (\d+) of 60; saved", said))) == 1, said
        assert len(kept(own)) >= 1
        assert [e.code for e in launch({**own, "resume": True})] == [0, 0]
        assert_same(own, tmp_path / "whole")
