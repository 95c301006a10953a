"""Token shards train as their texts do, and lose or double no window."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

from veneer.cli.frame import main
from veneer.data.order.mapped import Joined, Mapped
from veneer.data.order.order import Order
from veneer.errors import ConfigError, DataError
from veneer.runs import fit as training
from veneer.runs.texts import shards
from veneer.tasks.text import windows
from veneer.train.run import Run
from veneer.train.world import Alone
from veneer.verbs.data.prepare import prepare

READ = ("model", "data", "valid", "known", "length", "special_tokens")


def rows(folder: Any) -> str:
    """Pairs, conversations' masks and all, beside plain text."""
    pairs = [{"prompt": f"Q{i}: {tiny.text(i, 9)}", "completion": tiny.text(-i, 5)} for i in range(1, 40)]
    return str(tiny.jsonl(folder / "pairs.jsonl", *pairs))


@pytest.fixture
def settled(tmp_path):
    own = tiny.settings(tmp_path, steps=7)
    return {**own, "data": (own["data"], rows(tmp_path))}


def reading(own: dict[str, Any]) -> Run:
    return Run.from_dict({k: v for k, v in own.items() if k in READ})


def learned(own: dict[str, Any], **changed: Any) -> list[dict[str, Any]]:
    given = {**own, **changed}
    training.fit(Run.from_dict(given), progress=False)
    return tiny.metrics(Path(given["out"]))


def test_shards_train_as_their_texts_do(settled, tmp_path):
    found = prepare(reading(settled), tmp_path / "shards", progress=False, tokens=300)
    assert len(found["parts"]["train"]["shards"]) > 4
    whole = learned(settled, out=str(tmp_path / "texts"))
    few = {k: v for k, v in settled.items() if k not in ("valid", "known", "length")}
    assert learned(few, data=str(tmp_path / "shards"), out=str(tmp_path / "mapped")) == whole
    facts = [json.loads((tmp_path / d / "config.json").read_text())["data"] for d in ("texts", "mapped")]
    assert facts[0] == facts[1]


def test_a_training_on_shards_resumes(settled, tmp_path):
    prepare(reading(settled), tmp_path / "shards", progress=False)
    own = {**settled, "data": str(tmp_path / "shards")}
    whole = learned(own, out=str(tmp_path / "whole"))
    run = Run.from_dict({**own, "out": str(tmp_path / "twice")})
    training.fit_until(run, 3)
    assert learned(own, out=str(tmp_path / "twice"), resume=True) == whole


class Killed(BaseException):
    pass


def test_a_killed_preparation_goes_on_where_it_was(settled, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROWS", 5)
    whole = prepare(reading(settled), tmp_path / "whole", progress=False)
    once = shards.encode_rows
    calls: list[int] = []

    def counted(some: Any, task: Any) -> Any:
        if len(calls) == 4:
            raise Killed
        calls.append(len(some))
        return once(some, task)

    monkeypatch.setattr(shards, "encode_rows", counted)
    with pytest.raises(Killed):
        prepare(reading(settled), tmp_path / "killed", progress=False)
    assert len(list((tmp_path / "killed").glob("tokens-*"))) == 4
    with pytest.raises(DataError):  # no index, no shards
        learned(settled, data=str(tmp_path / "killed"), out=str(tmp_path / "no"))
    damaged = next((tmp_path / "killed").glob("tokens-*"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    monkeypatch.setattr(shards, "encode_rows", lambda some, task: calls.append(len(some)) or once(some, task))
    found = prepare(reading(settled), tmp_path / "killed", progress=False)
    assert found["parts"] == whole["parts"]
    assert (
        sum(calls) == sum(p["facts"]["rows"] for p in whole["parts"].values()) + 5
    )  # the damaged ones again
    assert not list((tmp_path / "killed").glob("tokens-*"))


def test_damaged_and_foreign_shards_are_refused(settled, tmp_path):
    folder = tmp_path / "shards"
    prepare(reading(settled), folder, progress=False)
    own = {**settled, "data": str(folder), "out": str(tmp_path / "no")}
    for name in ("train-00000.safetensors", "valid-rows.json"):
        path, before = folder / name, (folder / name).read_bytes()
        path.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
        with pytest.raises(DataError, match=f"1 of 7 files are missing or damaged: {name}; prepare"):
            learned(own)
        path.write_bytes(before)
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(index.replace('"windows": ', '"windows": 1'))
    with pytest.raises(DataError, match=r"index.json is damaged: its SHA-256 differs"):
        learned(own)
    (folder / "index.json").write_text(index)
    with pytest.raises(
        ConfigError, match="was prepared with other settings: length must be 32 or left out, got 16"
    ):
        learned({**own, "length": 16})
    with pytest.raises(ConfigError, match="stream and cache_frozen need texts"):
        learned({**own, "stream": True})
    with pytest.raises(ConfigError, match="must name one folder of token shards alone"):
        learned({**own, "data": (str(folder), settled["data"][0])})
    shutil.copytree(settled["model"], tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"single_word": false', '"single_word": true'))
    with pytest.raises(DataError, match="another tokenizer or chat template than that of"):
        learned({**own, "model": str(tmp_path / "other")})


def test_folders_that_are_not_free(settled, tmp_path):
    with pytest.raises(ConfigError, match="holds other files"):
        prepare(reading(settled), tmp_path, progress=False)
    prepare(reading(settled), tmp_path / "shards", progress=False)
    with pytest.raises(ConfigError, match="holds token shards already"):
        prepare(reading(settled), tmp_path / "shards", progress=False)


def test_the_command_line(settled, tmp_path, capsys):
    flags = ["--model", settled["model"], "--valid", settled["valid"], "--length", "32", "--json"]
    out = str(tmp_path / "shards")
    assert main(["data", "prepare", settled["data"][1], *flags, "--out", out]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == out and found["parts"]["train"]["facts"]["rows"] == 39
    assert found["bytes"] == sum(p.stat().st_size for p in (tmp_path / "shards").iterdir())


class Share(Alone):
    """One of several processes, which only takes its share."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


Sizes = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=30)


@settings(max_examples=30, deadline=None)
@given(sizes=Sizes, cut=st.integers(1, 9))
def test_mapped_windows_are_those_written(sizes, cut, tmp_path_factory):
    folder, at, every = tmp_path_factory.mktemp("mapped"), 0, []
    for some in sizes:
        own = [torch.arange(at + i, at + i + n) for i, n in enumerate(some)]
        at += 7
        every.append(tuple(windows.Segment(t, t + 1, t + 2) for t in own))
    files = []
    for n, begin in enumerate(range(0, len(every), cut)):
        files.append(folder / f"{n}.safetensors")
        shards.write_tensors(files[-1], windows.as_tensors(every[begin : begin + cut]))
    found = Mapped(files)
    assert len(found) == len(every)
    for a, b in zip([*found, *Joined(every, found)[:]], [*every, *every, *every], strict=True):
        assert all(torch.equal(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True))
    with pytest.raises(IndexError):
        found[len(every)]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    batch=st.integers(4, 6),
    accumulate=st.integers(1, 3),
    epochs=st.integers(1, 3),
    turns=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 4])), min_size=1, max_size=5),
)
def test_no_window_is_lost_or_doubled(n, batch, accumulate, epochs, turns):
    """A training that stops and goes on in other numbers of processes sees every window once an epoch."""
    total, seen, step = n * epochs, [], 0
    steps = Order(range(n), batch, accumulate, total=total, seed=3).steps
    for length, size in [*turns, (steps, 2)]:
        order = Order(range(n), batch, accumulate, total=total, seed=3)  # a new process has no memory
        upto = min(step + length, steps)
        for micro in map(order.step, range(step, upto)):
            seen += [i for rank in range(size) for some in Share(rank, size).shares(micro) for i in some]
        step = upto
    assert Counter(seen) == Counter(list(range(n)) * epochs)
