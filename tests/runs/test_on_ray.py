"""--engine ray: trains in workers of Ray Train to the losses of one process, and goes on after a kill."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import tiny
from support.lost_worker import Killing

from veneer.errors import ConfigError, VeneerError
from veneer.runs.fit import fit
from veneer.runs.on_ray import cluster
from veneer.runs.on_ray.fit import _followed, _reason
from veneer.runs.on_ray.worker import Desk, Lines, following, rebuilt
from veneer.train.errors import Interrupted
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
KILLED_AT = 15  # the first micro-batch of step 8; checkpoints are at steps 3 and 6
NEVER = 1 << 30


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def joined():
    ray = cluster.module()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # for the loss of the tests
        with cluster.joined(ray):
            yield ray


def run_of(place: Path, out: str, **changed: Any) -> Run:
    return Run.from_dict(
        {**tiny.settings(place, options={"rank": 4}), "out": str(place / out), "compile": "off", **changed}
    )


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@RAY
@pytest.mark.ray
def test_a_lost_worker_is_started_again_to_the_losses_of_one_process(place, joined, capfd):
    whole = fit(run_of(place, "whole"), progress=False, objective=Killing(NEVER, ""))
    assert len(losses(whole.folder)) == 14
    marker = place / "marker"
    ours = fit(
        run_of(place, "killed"),
        objective=Killing(KILLED_AT, str(marker)),
        engine="ray",
        workers=2,
        max_restarts=1,
    )
    assert marker.exists()
    said = capfd.readouterr().err
    assert "Ray starts 2 workers" in said and "restart 1: a worker was lost" in said
    assert losses(ours.folder).keys() == losses(whole.folder).keys()
    for step, loss in losses(whole.folder).items():
        assert losses(ours.folder)[step] == pytest.approx(loss, abs=1e-6)
    assert ours.learned.after == pytest.approx(whole.learned.after, abs=1e-6)
    assert not (place / ".killed.ray").exists()


@RAY
@pytest.mark.ray
def test_a_signal_to_the_driver_saves_at_one_step_and_resumes(place, joined):
    long: dict[str, Any] = {"steps": 400, "eval_every": 400, "save_every": 400}
    own = run_of(place, "signalled", **long)

    def send() -> None:
        metrics = place / "signalled" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text(encoding="utf-8").count("gradient_norm") >= 3):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Interrupted, match=r"stopped by signal 15 after step \d+ of 400; saved in") as caught:
        fit(own, progress=False, engine="ray", workers=2)
    assert caught.value.exit_code == 143
    (saved,) = (p.name for p in (place / "signalled" / "checkpoints").iterdir())
    assert 3 <= int(saved.removeprefix("step-")) < 400


@RAY
@pytest.mark.ray
def test_two_workers_end_at_the_loss_of_one_process_and_errors_come_back(place, joined):
    whole = fit(run_of(place, "alone"), progress=False)
    ours = fit(run_of(place, "two"), progress=False, engine="ray", workers=2)
    assert ours.learned.after == pytest.approx(whole.learned.after, abs=1e-6)
    with pytest.raises(ConfigError, match=r"^out .*two holds another run \(finished\)"):
        fit(run_of(place, "two"), progress=False, engine="ray", workers=2)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"engine": "slurm"}, "engine must be torch or ray, got 'slurm'"),
        ({"workers": 2}, "workers=2 needs engine='ray'; torchrun has flags of its own"),
        ({"max_restarts": 0}, "max_restarts=0 needs engine='ray'; torchrun has flags of its own"),
        ({"engine": "ray", "max_restarts": -1}, "max_restarts must be 0 or more, got -1"),
        ({"engine": "ray"}, "engine='ray' needs Ray Train: pip install 'veneer[ray]'"),
    ],
)
def test_impossible_engines_are_refused(place, monkeypatch, given, sentence):
    for name in [n for n in sys.modules if n.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    importing = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return importing(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError) as caught:
        fit(run_of(place, "refused"), progress=False, **given)
    assert str(caught.value) == sentence
    assert not (place / "refused").exists()


def test_a_process_of_a_launcher_starts_no_workers(place, monkeypatch):
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^engine='ray' starts its own processes, got those of a launcher"):
        fit(run_of(place, "nested"), progress=False, engine="ray")


@pytest.mark.parametrize(
    ("there", "device", "workers", "found"),
    [
        ({"CPU": 4.0}, "auto", None, (1, False)),
        ({"CPU": 4.0}, "auto", 4, (4, False)),
        ({"CPU": 4.0, "GPU": 2.0}, "auto", None, (2, True)),
        ({"CPU": 4.0, "GPU": 2.0}, "cpu", 3, (3, False)),
        ({"CPU": 4.0}, "auto", 5, "workers must be 1 to 4, the CPUs of the cluster, got 5"),
        ({"CPU": 4.0, "GPU": 2.0}, "cuda", 3, "workers must be 1 to 2, the GPUs of the cluster, got 3"),
        ({"CPU": 4.0}, "auto", 0, "workers must be 1 to 4, the CPUs of the cluster, got 0"),
        ({"CPU": 4.0}, "cuda", None, "device must be auto or cpu on a cluster without GPUs, got cuda"),
        ({"GPU": 4.0}, "cuda:1", None, "device must be auto, cpu or cuda for workers of Ray, got cuda:1"),
    ],
)
def test_each_worker_has_a_device_of_its_own(there, device, workers, found):
    ray, run = SimpleNamespace(cluster_resources=lambda: there), SimpleNamespace(device=device)
    if isinstance(found, tuple):
        assert cluster.places(ray, run, workers) == found
        return
    with pytest.raises(ConfigError) as caught:
        cluster.places(ray, run, workers)
    assert str(caught.value) == found


def test_the_desk_counts_restarts_and_keeps_the_first_error_whole():
    desk, stopped = Desk(), Interrupted("stopped after step 3", signal.SIGTERM)
    assert not desk.start(True) and not desk.start(False)
    assert not desk.start(True)
    assert desk.news() == (["restart 1: a worker was lost; all go on from the newest checkpoint"], None)
    desk.end(type(stopped), stopped.args, stopped.__dict__)
    desk.end(VeneerError, ("later",), {})
    assert desk.start(True) and desk.start(False)
    lines, parts = pickle.loads(pickle.dumps(desk.news()))
    assert lines == []
    again = rebuilt(*parts)
    assert (type(again), str(again), again.exit_code) == (Interrupted, "stopped after step 3", 143)


def test_a_worker_stops_once_the_desk_wants_it(place):
    desk = Desk()
    far = SimpleNamespace(wanted=SimpleNamespace(remote=desk.wanted))
    threading.Timer(1.0, lambda: desk.stop(signal.SIGTERM)).start()
    with pytest.raises(Interrupted, match=r"stopped by signal 15 after step \d+ of 9000; saved"):
        with following(far, lambda made: made):
            fit(run_of(place, "followed", steps=9000, eval_every=9000, save_every=9000), progress=False)
    with following(far, lambda made: made):  # wanted before the first step
        with pytest.raises(Interrupted):
            time.sleep(1)
            fit(run_of(place, "later", steps=9, eval_every=9, save_every=9), progress=False)


def test_a_signal_is_told_to_the_desk_once():
    told: list[int] = []
    ended = threading.Event()
    desk = SimpleNamespace(
        news=SimpleNamespace(remote=lambda: ([], None)),
        stop=SimpleNamespace(remote=lambda number: (told.append(number), ended.set())),
    )

    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(30)
        time.sleep(1)

    before = signal.getsignal(signal.SIGTERM)
    trainer, ray = SimpleNamespace(fit=work), SimpleNamespace(get=lambda made: made)
    assert _followed(ray, trainer, desk, Voice(False)) is None
    assert told == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is before


def test_whole_lines_are_sent():
    sent: list[str] = []
    lines = Lines(SimpleNamespace(say=SimpleNamespace(remote=sent.append)))
    print("one\ntwo", end="", file=lines)
    assert sent == ["one"]
    print(" and three", file=lines, flush=True)
    assert sent == ["one", "two and three"] and not lines.isatty()


def test_a_failure_names_the_first_worker_that_failed():
    failed = SimpleNamespace(worker_failures={1: ValueError("b"), 0: ValueError("Traceback\n  a\nlast")})
    assert _reason(failed) == "process 0: last"
    assert _reason(RuntimeError("Ray ended\n  why\n")) == "why"


def test_lines_are_said_while_the_trainer_works_and_its_failure_is_returned(capfd):
    news = [(["step 1"], None), (["step 2"], None)]
    desk = SimpleNamespace(news=SimpleNamespace(remote=lambda: news.pop(0) if news else ([], None)))
    lost = RuntimeError("lost")

    def work() -> None:
        time.sleep(0.5)
        raise lost

    ray = SimpleNamespace(get=lambda made: made)
    assert _followed(ray, SimpleNamespace(fit=work), desk, Voice(True)) is lost
    assert capfd.readouterr().err.splitlines() == ["step 1", "step 2"]
