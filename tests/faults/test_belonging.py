"""A checkpoint is used by its own run alone, with its own metrics and rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import tally, tiny
from support.resuming import Killed, assert_same, killed_at

from veneer import optim
from veneer.errors import DataError, FormatError
from veneer.runs.fit import fit
from veneer.train.run import Run

SHORT = {"steps": 8, "eval_every": 4, "save_every": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("belonging")


def train(given: dict[str, Any], **changed: Any) -> None:
    fit(Run.from_dict({**given, **changed}), progress=False)


def halfway(given: dict[str, Any], step: int = 7) -> Path:
    """Trains to that step, where it dies; returns the folder."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step)
        train(given)
    return Path(given["out"])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({}, "id of the run"),
        ({"lr": 2e-2}, "id of the run and settings"),
        ({"valid": "train.txt"}, "id of the run and settings and data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(place, tmp_path, other, named):
    given = tiny.settings(place, **SHORT, out=str(tmp_path / "own"))
    other = {k: str(place / v) if k == "valid" else v for k, v in other.items()}
    own, alien = halfway(given), halfway({**given, **other, "out": str(tmp_path / "other")})
    shutil.rmtree(own / "checkpoints" / "step-000006")
    shutil.copytree(alien / "checkpoints" / "step-000006", own / "checkpoints" / "step-000006")
    with pytest.raises(FormatError) as e:
        train(given, resume=True)
    assert str(e.value) == (
        f"{own / 'checkpoints' / 'step-000006'} belongs to another run than the config.json beside it: they"
        f" differ in {named}; move the checkpoint away, or restore the run's folder from a copy"
    )
    shutil.rmtree(own / "checkpoints" / "step-000006")
    train(given, resume=True)


def test_a_checkpoint_under_a_config_of_other_settings_is_refused(place, tmp_path):
    """Both name the same run: config.json was edited, and the new run asks for what it says now."""
    given = tiny.settings(place, **SHORT, out=str(tmp_path / "run"))
    config = halfway(given) / "config.json"
    content = json.loads(config.read_text())
    content["run"]["lr"] = 0.5
    config.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"step-000006 belongs to another run .*they differ in settings;"):
        train(given, resume=True, lr=0.5)


def test_settings_that_were_allowed_to_change_keep_the_checkpoints(place, tmp_path):
    given = tiny.settings(place, **SHORT, out=str(tmp_path / "run"))
    config = halfway(given) / "config.json"
    before = json.loads(config.read_text())
    given = {**given, "lr": 2e-2, "allow": ["config"]}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 0)
        train(given, resume=True)
    train({**given, "allow": []}, resume=True, save_every=5)  # and what is free
    after = json.loads(config.read_text())
    assert after["id"] == before["id"] and len(after["earlier"]) == 1
    assert "resumes at step 6" in json.loads((config.parent / "results.json").read_text())["notes"]
    metas = [json.loads(p.read_text()) for p in (config.parent / "checkpoints").glob("step-*/meta.json")]
    assert {m["owner"]["id"] for m in metas} == {before["id"]}
    assert len({m["owner"]["settings"] for m in metas}) == 2


def test_a_flipped_bit_in_the_metrics_is_seen(place, tmp_path):
    given = tiny.settings(place, **SHORT, out=str(tmp_path / "run"))
    whole = {**given, "out": str(tmp_path / "whole")}
    train(whole)
    metrics = halfway(given) / "metrics.jsonl"
    good = metrics.read_bytes()
    covered = json.loads((metrics.parent / "checkpoints/step-000006/meta.json").read_text())["metrics_bytes"]
    assert covered < len(good)  # step 7 is computed again
    for bit in tally.sample(range(8 * covered), 3, 40):
        metrics.write_bytes(good[: bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :])
        with tally.one("flips"), pytest.raises(FormatError, match=f"the first {covered} bytes of .* changed"):
            train(given, resume=True)
    metrics.write_bytes(good[:covered] + bytes(reversed(good[covered:])))
    train(given, resume=True)
    assert_same(given, Path(whole["out"]))


# -- rows of a stream


# Far more windows are learned in six steps than the 64 at the beginning that config.json records.
STREAM = {**SHORT, "stream": True, "buffer": 4, "batch": 12}


def rows(path: Path, changed: int | None = None, n: int = 150) -> Path:
    """Rows; the changed one has as many bytes as before, so that no size tells."""
    texts = [tiny.text(100 + i, 40) for i in range(n)]
    if changed is not None:
        texts[changed] = texts[changed][::-1]
    return tiny.jsonl(path, *({"text": text} for text in texts))


@pytest.mark.parametrize(("changed", "seen"), [(50, True), (65, True), (149, False)])
def test_a_stream_whose_learned_rows_changed_is_refused(place, tmp_path, changed, seen):
    data = rows(tmp_path / "rows.jsonl")
    given = tiny.settings(place, **STREAM, data=str(data), out=str(tmp_path / "run"))
    halfway(given)
    rows(data, changed)
    if not seen:  # a row that no step had read
        train(given, resume=True)
        return
    with pytest.raises(DataError) as e:
        train(given, resume=True)
    assert "rows of the stream have changed since they were learned; restore them, or go on with" in str(
        e.value
    )
    train(given, resume=True, allow=["data"])


def test_a_stream_that_became_shorter_is_refused(place, tmp_path):
    data = rows(tmp_path / "rows.jsonl")
    given = tiny.settings(place, **STREAM, data=str(data), out=str(tmp_path / "run"))
    halfway(given)
    size = data.stat().st_size
    rows(data, n=40)
    with data.open("a") as f:  # of the same size, so that the record of the data does not tell
        f.write("\n" * (size - data.stat().st_size))
    with pytest.raises(DataError, match="rows of the stream have changed since they were learned"):
        train(given, resume=True)


def test_a_stream_that_changes_between_two_passes_is_refused(place, tmp_path):
    data = rows(tmp_path / "rows.jsonl", n=6)
    given = tiny.settings(place, data=str(data), stream=True, buffer=2, out=str(tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match="the rows of the stream have"):
        change_at(patch, 2, lambda: rows(data, 5, n=6))
        train(given)


def change_at(patch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    from veneer.train.loop.step import Learner

    own, taken = Learner.step, []

    def learn(*given):
        taken.append(None)
        if len(taken) == step:
            act()
        return own(*given)

    patch.setattr(Learner, "step", learn)


# -- state of optimisers


@pytest.mark.parametrize(
    "name", tally.few(["galore", "lorapro", *sorted({*optim.available()} - {"galore", "lorapro"})], 2)
)
def test_every_optimiser_resumes_bit_for_bit(place, tmp_path, name):
    own = {"rank": 4, "period": 2} if name == "galore" else {}
    method = {"method": "full", "options": {}} if name == "galore" else {}
    given = tiny.settings(place, **SHORT, **method, optimiser=name, optimiser_options=own)
    whole = {**given, "out": str(tmp_path / "whole")}
    train(whole)
    given["out"] = str(tmp_path / "run")
    halfway(given)
    with tally.one("kills"):
        train(given, resume=True)
        assert_same(given, Path(whole["out"]))
