"""Trackers: what each library has kept, read back; going on under the same name; and a failure that costs
no training."""

from __future__ import annotations

import json
import sqlite3
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from veneer.errors import ConfigError
from veneer.runs.fit import fit
from veneer.train import track
from veneer.train.loop.progress import Voice
from veneer.train.run import Run
from veneer.train.track import base, feed

CONFIG = {"run": {"lr": 0.01, "options": {"rank": 4}, "data": ["a.txt"]}, "base": {"sha256": "abc"}}
RESULTS = {
    "steps": 4,
    "learned": {"text": "valid", "before": 2.0, "after": 1.5},
    "layers": [{"norm": 1.0}],
    "notes": ["x"],
}


def told(name: str, folder: Path, *, pause: float = 0.0) -> Voice:
    """A run that is stopped after three steps, and goes on from the checkpoint of the second to the end."""
    voice = Voice(False)
    with track.Feed([name], folder, CONFIG, voice) as first:
        first.start(0)
        first.log({"step": 0, "valid_bpb": 2.0, "seconds": 0.0})
        for step in (1, 2, 3):
            first.log({"step": step, "loss": 1.0 / step, "skipped": "text"})
    time.sleep(pause)
    with track.Feed([name], folder, CONFIG, voice) as again:
        again.start(2)
        for step in (3, 4):
            again.log({"step": step, "loss": 1.0 / step})
        again.finish(RESULTS)
    return voice


def kept(folder: Path, name: str) -> Any:
    return json.loads((folder / feed.KEPT).read_text(encoding="utf-8"))[name]


# -- what each library has -----------------------------------------------------------------------------------


def test_tensorboard_shows_one_curve_of_a_resumed_run(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert told("tensorboard", tmp_path).said == []
    found = reading.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in found.Scalars("loss")] == [
        (s, 1 / s) for s in (1, 2, 3, 4)
    ]
    assert [(e.step, e.value) for e in found.Scalars("valid_bpb")] == [(0, 2.0)]
    assert found.Scalars("results/learned.after")[0].value == 1.5
    assert '"rank": 4' in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_wandb_writes_offline_runs_with_one_id(tmp_path):
    pytest.importorskip("wandb")
    assert told("wandb", tmp_path, pause=1.1).said == []  # its folders are named by the second
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {p.name for p in runs} == {f"run-{kept(tmp_path, 'wandb')}.wandb"}
    records = [r for p in runs for r in ended(p)]
    steps = [
        row for r in records if r.WhichOneof("record_type") == "history" for row in [items(r.history.item)]
    ]
    assert [(r["_step"], r["loss"]) for r in steps if "loss" in r] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (3, 1 / 3),
        (4, 0.25),
    ]
    assert any(
        items(r.summary.update).get("learned.after") == 1.5
        for r in records
        if r.WhichOneof("record_type") == "summary"
    )
    settings = [items(r.run.config.update) for r in records if r.WhichOneof("record_type") == "run"]
    assert settings and all(s["run"] == CONFIG["run"] for s in settings)


def ended(path: Path) -> list[Any]:
    """The records of a finished run; a process of wandb's own may write the last ones a little later."""
    for _ in range(300):
        records = wandb_records(path)
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    return records


def wandb_records(path: Path) -> list[Any]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB of (checksum, length, kind) and
    bytes, after a header of 7."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def items(entries: Any) -> dict[str, Any]:
    return {e.key or ".".join(e.nested_key): json.loads(e.value_json) for e in entries}


def test_mlflow_keeps_one_run_in_the_folder(tmp_path):
    for package in track.get("mlflow").packages:
        pytest.importorskip(package)
    assert told("mlflow", tmp_path).said == []
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        runs = store.execute("select run_uuid, status, name from runs").fetchall()
        losses = store.execute(
            "select distinct step, value from metrics where key = 'loss' order by step"
        ).fetchall()
        results = store.execute("select value from metrics where key = 'results.learned.after'").fetchall()
        settings = dict(store.execute("select key, value from params").fetchall())
    assert runs == [(kept(tmp_path, "mlflow"), "FINISHED", tmp_path.name)]
    assert losses == [(s, 1 / s) for s in (1, 2, 3, 4)] and results == [(1.5,)]
    assert settings == {"lr": "0.01", "options.rank": "4", "data": "['a.txt']"}


def test_trackio_keeps_one_run_and_prints_nothing_on_stdout(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(
        "TRACKIO_DIR", str(tmp_path / "store")
    )  # read when trackio is imported, which this test alone does
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/somewhere")
    pytest.importorskip("trackio")
    assert told("trackio", tmp_path).said == []
    assert capsys.readouterr().out == ""
    with sqlite3.connect(tmp_path / "store" / "veneer.db") as store:
        rows = [
            (n, s, json.loads(m))
            for n, s, m in store.execute("select run_name, step, metrics from metrics order by id").fetchall()
        ]
    assert {name for name, _, _ in rows} == {kept(tmp_path, "trackio")}
    assert sorted({(s, m["loss"]) for _, s, m in rows if "loss" in m}) == [(s, 1 / s) for s in (1, 2, 3, 4)]
    assert any(m.get("results.learned.after") == 1.5 for _, _, m in rows)


# -- the run -------------------------------------------------------------------------------------------------


def test_a_run_is_told_what_metrics_jsonl_gets(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = fit(
        Run.from_dict(tiny.settings(tmp_path, steps=4, eval_every=2, track="tensorboard")), progress=False
    )
    found = reading.EventAccumulator(str(result.folder / "tensorboard"))
    found.Reload()
    lines = tiny.metrics(result.folder)
    for name in ("loss", "lr", "valid_bpb", "known_bpb"):
        assert [(e.step, e.value) for e in found.Scalars(name)] == [
            (r["step"], pytest.approx(r[name])) for r in lines if name in r
        ]
    assert found.Scalars("results/learned.after")[0].value == pytest.approx(result.learned.after)


class Broken(base.Tracker):
    """Takes two figures and fails from then on."""

    packages = ()
    calls: list[str] = []

    def start(self, folder, config, *, step, known):
        self.calls.append("start")
        return None

    def log(self, step, figures):
        self.calls.append("log")
        if len(self.calls) > 3:
            raise OSError("the disk\nis full")

    def finish(self, results):
        self.calls.append("finish")


def test_a_tracker_that_fails_is_said_once_and_costs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feed, "get", lambda name: Broken)
    Broken.calls = []
    result = fit(Run.from_dict(tiny.settings(tmp_path, steps=4, eval_every=2, track="tensorboard")))
    sentence = (
        "tracker tensorboard failed (OSError: the disk) and gets no more figures; the run goes"
        " on, and metrics.jsonl has them all"
    )
    assert Broken.calls == ["start", "log", "log", "log"]
    assert capsys.readouterr().err.count(sentence) == 1 and sentence in result.metrics["notes"]
    assert [line["step"] for line in tiny.metrics(result.folder) if "loss" in line] == [1, 2, 3, 4]


def test_a_tracker_that_cannot_start_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Broken, "start", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(feed, "get", lambda name: Broken)
    Broken.calls = []
    voice = Voice(False)
    with track.Feed(["wandb"], tmp_path, CONFIG, voice) as told:
        told.start(0)
        told.log({"step": 1, "loss": 1.0})
    assert Broken.calls == [] and voice.said[0].startswith(
        "tracker wandb failed (ZeroDivisionError: division by zero)"
    )


def test_names_that_were_lost_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "get", lambda name: Broken)
    (tmp_path / feed.KEPT).write_text("{", encoding="utf-8")
    voice = Voice(False)
    with track.Feed(["wandb"], tmp_path, CONFIG, voice) as told:
        told.start(3)
    assert (
        len(voice.said) == 1
        and "track.json is not JSON" in voice.said[0]
        and "begins anew in its trackers" in voice.said[0]
    )


# -- at the door ---------------------------------------------------------------------------------------------


def test_names_are_checked_and_may_be_joined_by_commas():
    assert Run.from_dict({"data": "a.txt", "track": "tensorboard,wandb"}).track == ("tensorboard", "wandb")
    with pytest.raises(
        ConfigError, match="track: unknown tracker 'tensorbord'; did you mean 'tensorboard'\\?"
    ):
        Run.from_dict({"data": "a.txt", "track": ["tensorbord"]})


def test_a_library_that_is_not_there_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as e:
        fit(Run.from_dict(tiny.settings(tmp_path, track="wandb,mlflow")), progress=False)
    assert str(e.value).splitlines() == [
        "track: wandb needs the package wandb: pip install 'veneer[wandb]'",
        "track: mlflow needs the package mlflow, sqlalchemy, alembic: pip install 'veneer[mlflow]'",
    ]
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_an_error():
    with pytest.raises(ConfigError, match="unknown tracker 'wand'; did you mean 'wandb'"):
        track.get("wand")
    assert track.available() == ["mlflow", "tensorboard", "trackio", "wandb"]
