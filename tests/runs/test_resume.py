"""Killed, stopped, damaged or misused, a training goes on bit for bit as if nothing had happened, or says
why it cannot."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.resuming import assert_same
from support.room import room_for

from veneer.adapt.store import store
from veneer.errors import ConfigError, FormatError
from veneer.runs.fit import fit
from veneer.train.errors import Busy, Diverged, NotSaved
from veneer.train.folder import checkpoint, lock
from veneer.train.run import Run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """The folder of a training that nothing interrupted."""
    given = tiny.settings(place, out=str(place / "whole"))
    fit(Run.from_dict(given), progress=False)
    return place / "whole"


@pytest.fixture
def given(place, tmp_path) -> dict[str, Any]:
    """The same training, in a folder of its own."""
    return tiny.settings(place, out=str(tmp_path / "run"))


def resumed(given: dict[str, Any], **changed: Any) -> Run:
    return Run.from_dict({**given, "resume": True, **changed})


def steps(given: dict[str, Any]) -> list[str]:
    return sorted(p.name for p in (Path(given["out"]) / "checkpoints").iterdir())


def halfway(given: dict[str, Any], step: int = 5) -> None:
    """Trains until after that step, where a signal stops it."""
    assert tiny.train(given, signal_at=(step, signal.SIGTERM)) == 143


# -- kills and signals ---------------------------------------------------------------------------------------


def test_metrics_are_what_a_training_computes(whole):
    lines = tiny.metrics(whole)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 15))
    assert [line["step"] for line in lines if "valid_bpb" in line] == [0, 4, 8, 12, 14]
    assert max(line.get("labels", 0) for line in lines) == 2 * 2 * 32
    assert lines[-2]["tokens"] == sum(line.get("labels", 0) for line in lines)  # plain text: all is learned


@pytest.mark.parametrize("step", [1, 6, 13])
def test_killed_after_a_step_and_resumed(given, whole, step):
    assert tiny.train(given, signal_at=(step, signal.SIGKILL)) == -signal.SIGKILL
    assert tiny.train({**given, "resume": True}) == 0
    assert_same(given, whole)


def test_killed_again_and_again_at_any_time(given, whole):
    draw, codes = random.Random(0), [-signal.SIGALRM]
    while codes[-1] == -signal.SIGALRM:
        codes.append(
            tiny.train(
                {**given, "resume": True}, die_after=draw.uniform(0.002, 0.08) if len(codes) < 12 else 0.0
            )
        )
    assert codes[-1] == 0 and len(codes) > 3
    assert_same(given, whole)


@pytest.mark.parametrize(
    ("number", "code", "step"),
    [
        (signal.SIGTERM, 143, 5),
        (signal.SIGINT, 130, 4),
        (signal.SIGHUP, 129, 5),
        (signal.SIGTERM, 143, 14),
    ],  # after 4 and 14 a text is being measured
)
def test_a_signal_ends_the_step_saves_and_tells_the_shell(given, whole, number, code, step):
    assert tiny.train(given, signal_at=(step, number)) == code
    assert checkpoint.damage(Path(given["out"]) / "checkpoints" / f"step-{step:06d}") is None
    assert tiny.metrics(Path(given["out"])) == tiny.metrics(whole)[: len(tiny.metrics(Path(given["out"])))]
    fit(resumed(given), progress=False)
    assert_same(given, whole)


def test_a_finished_run_is_returned_as_it_is(given, whole):
    shutil.copytree(whole, given["out"])
    before = {p: p.stat().st_mtime_ns for p in Path(given["out"]).rglob("*") if p.name != "lock"}
    result = fit(resumed(given), progress=False)
    assert result.metrics == json.loads((whole / "results.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in Path(given["out"]).rglob("*") if p.name != "lock"} == before


# -- damage --------------------------------------------------------------------------------------------------


def saved(folder: Path, *numbers: int) -> None:
    for n in numbers:
        checkpoint.save(
            folder, n, {"p.x": torch.full((3, 5), float(n)), "rng": torch.arange(7)}, {"position": n}
        )


def newest(folder: Path) -> tuple[int | None, list[str]]:
    found, damaged = checkpoint.newest(folder)
    if found:
        assert found.tensors["p.x"].eq(found.step).all() and found.meta["position"] == found.step
    return found.step if found else None, damaged


def test_every_flipped_bit_is_seen(tmp_path):
    saved(tmp_path, 1)
    path, draw = tmp_path / "step-000001", random.Random(1)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for bit in draw.sample(range(8 * len(good)), 150):
            file.write_bytes(good[: bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :])
            assert checkpoint.damage(path), f"bit {bit} of {file.name}"
        file.write_bytes(good)
    assert checkpoint.damage(path) is None


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    "harm",
    [
        lambda p: cut(p / "state.safetensors"),
        lambda p: (p / "meta.json").unlink(),
        lambda p: (p / "MANIFEST.json").unlink(),
        lambda p: (p / "MANIFEST.json").write_text(""),
        lambda p: (p / "MANIFEST.json").write_text("[]"),
        lambda p: (p / "MANIFEST.json").write_text('{"../other": {"sha256": "", "bytes": 0}}'),
        lambda p: shutil.rmtree(p) or p.mkdir(),
        lambda p: shutil.rmtree(p) or shutil.copytree(p.with_name("step-000002"), p),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path, harm: Callable[[Path], object]
):
    saved(tmp_path, 2, 3)
    harm(tmp_path / "step-000003")
    step, (said,) = newest(tmp_path)
    assert step == 2
    aside = next(p for p in tmp_path.iterdir() if p.name.startswith("corrupt-step-000003-"))
    assert said.startswith("step-000003 is damaged (") and said.endswith(f") and set aside as {aside.name}")
    assert newest(tmp_path) == (2, [])


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    saved(tmp_path, 2)
    (tmp_path / "step-000009").write_text("a file")
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-000002" / "extra").write_text("never read")
    assert newest(tmp_path) == (2, [])
    assert newest(tmp_path / "nowhere") == (None, [])


def test_a_bit_flipped_in_the_newest_checkpoint_changes_nothing(given, whole):
    halfway(given, 7)
    state = Path(given["out"]) / "checkpoints" / "step-000007" / "state.safetensors"
    raw = bytearray(state.read_bytes())
    raw[-100] ^= 4
    state.write_bytes(raw)
    result = fit(resumed(given), progress=False)
    assert_same(given, whole)
    assert any(
        n.startswith("step-000007 is damaged (state.safetensors is not what MANIFEST.json says)")
        for n in result.metrics["notes"]
    )
    assert "resumes at step 6" in result.metrics["notes"]


class Killed(BaseException):
    """Ends a save where it is, without any cleaning up, as a kill would."""


def test_killed_at_any_point_of_saving_or_pruning_old_or_new_is_left(tmp_path, monkeypatch):
    calls, die_at = 0, 1 << 30

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == die_at:
                if real is rmtree:  # dies halfway
                    next(args[0].iterdir()).unlink()
                raise Killed
            return real(*args, **kwargs)

        return call

    rmtree = shutil.rmtree

    for owner, name in (
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "write_text"),
        (checkpoint, "save_file"),
        (checkpoint, "sync"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", counted(rmtree))

    def save_and_prune(folder: Path) -> None:
        saved(folder, 3, 3)  # the second time in place of the first
        checkpoint.prune(folder, 2, ())

    for point in range(1, 60):
        folder = tmp_path / str(point)
        calls, die_at = 0, 1 << 30
        saved(folder, 1, 2)
        calls, die_at = 0, point
        try:
            save_and_prune(folder)
            break
        except Killed:
            die_at = 1 << 30
            assert newest(folder) in ((2, []), (3, []))
            assert sum(checkpoint.damage(p) is None for p in checkpoint.found(folder)) >= 2
            assert not list(folder.glob(".tmp-*"))
    assert point > 20


def test_the_newest_and_the_best_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5)
    checkpoint.prune(tmp_path, 2, {2})
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-000002", "step-000004", "step-000005"]


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path):
    saved(tmp_path, 1, 2)
    with room_for(1000), pytest.raises(NotSaved) as e:
        checkpoint.save(tmp_path, 3, {"p.x": torch.zeros(100, 100)}, {})
    assert str(e.value).startswith(
        f"the checkpoint of step 3 (40,000 bytes) could not be written to {tmp_path / 'step-000003'}: "
    )
    assert str(e.value).endswith("; kept: step-000002, step-000001")
    assert e.value.exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"] and newest(
        tmp_path
    ) == (2, [])


def test_a_full_disk_in_a_training_can_be_resumed_from(given, whole, monkeypatch):
    halfway(given)
    with (
        room_for(20_000),
        pytest.raises(NotSaved, match="the checkpoint of step 6 "),
    ):  # a state has 60,000 bytes
        fit(resumed(given), progress=False)
    assert steps(given) == ["step-000003", "step-000004", "step-000005"]
    room = (Path(given["out"]) / "metrics.jsonl").stat().st_size - 10  # too little for the line of step 6
    with (
        room_for(room),
        pytest.raises(
            NotSaved, match=r"bytes could not be added to .*metrics.jsonl: .*; the checkpoints are untouched"
        ),
    ):
        fit(resumed(given), progress=False)
    full = OSError(28, "No space left on device")
    with (
        monkeypatch.context() as disk,
        pytest.raises(NotSaved, match=r"the adapter could not be written to .*adapter: .*No space left"),
    ):
        disk.setattr(store.files, "write_tensors", lambda *args: (_ for _ in ()).throw(full))
        fit(resumed(given), progress=False)
    assert not (Path(given["out"]) / "results.json").exists()
    fit(resumed(given), progress=False)
    assert_same(given, whole)


# -- refusals ------------------------------------------------------------------------------------------------


def test_two_trainings_in_one_folder_are_refused(given):
    halfway(given)
    before = tiny.metrics(Path(given["out"]))
    with lock.held(Path(given["out"])):
        began = time.monotonic()
        with pytest.raises(Busy) as e:
            fit(resumed(given), progress=False)
        assert time.monotonic() - began < 2
    assert str(e.value).startswith(f"{given['out']} is being written by another training (process ")
    assert tiny.metrics(Path(given["out"])) == before


def test_another_run_and_other_files_in_the_folder_are_refused(given, tmp_path):
    halfway(given)
    with pytest.raises(ConfigError) as e:
        fit(Run.from_dict(given), progress=False)
    assert str(e.value) == (
        f"out {given['out']} holds another run (unfinished); go on with it by resume=True, or choose another"
        " folder"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="is not empty and holds no run; choose another folder"):
            fit(Run.from_dict({**given, "out": str(tmp_path / "full"), "resume": resume}), progress=False)
    with pytest.raises(ConfigError, match=r"out .*thesis\.txt is a file; name a folder"):
        fit(Run.from_dict({**given, "out": str(tmp_path / "full" / "thesis.txt")}), progress=False)


def test_other_settings_texts_or_weights_are_refused_with_a_list(given, place, tmp_path):
    halfway(given)
    base, train = tmp_path / "base", tmp_path / "train.txt"
    shutil.copytree(place / "base", base)
    weights = base / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3:] = b"\x01\x02\x03"
    weights.write_bytes(raw)
    train.write_text(tiny.text(1, 1200) + "one more", encoding="utf-8")
    changed = {"lr": 0.5, "keep": 7, "model": str(base), "data": str(train)}
    with pytest.raises(ConfigError) as e:
        fit(resumed(given, **changed), progress=False)
    lines = str(e.value).splitlines()
    checkpoint = Path(given["out"]) / "checkpoints" / steps(given)[-1]
    assert (
        len({f.stat().st_mode for f in checkpoint.iterdir()}) == 1
    )  # the tensors can be read by whom the rest can
    assert (
        lines[0]
        == f"{given['out']} was begun with other settings, texts or weights than it would go on with:"
    )
    assert "  config: lr: 0.01 -> 0.5" in lines and not any("keep" in line for line in lines)
    assert any(line.startswith("  data: train: ") for line in lines) and any(
        line.startswith("  base: sha256: ") for line in lines
    )
    assert (
        lines[-1] == "put them back, begin anew in another folder, or pass allow=('config', 'data', 'base')"
    )
    with pytest.raises(ConfigError, match=r"or pass allow=\('data', 'base'\)"):
        fit(resumed(given, **changed, allow=["config"]), progress=False)
    result = fit(resumed(given, **changed, allow=["config", "data", "base"]), progress=False)
    assert (
        "differs from the beginning of the run, as allowed: config: lr: 0.01 -> 0.5"
        in result.metrics["notes"]
    )
    config = json.loads((Path(given["out"]) / "config.json").read_text())
    assert config["run"]["lr"] == 0.5 and "config: lr: 0.01 -> 0.5" in config["allowed"]


def test_settings_that_came_after_the_run_began_are_at_their_defaults(given):
    halfway(given)
    path = Path(given["out"]) / "config.json"
    begun = json.loads(path.read_text())
    for gone in ("clip", "train_on", "rank_pattern", "optimiser_options"):
        del begun["run"][gone]
    path.write_text(json.dumps(begun))
    with pytest.raises(ConfigError) as e:
        fit(resumed(given, clip=0.5, train_on="all"), progress=False)
    assert str(e.value).splitlines()[1:-1] == [
        "  config: clip: 1.0 -> 0.5",
        "  config: train_on: completion -> all",
    ]
    rank = given["options"]["rank"]
    with pytest.raises(ConfigError, match=rf"\n  config: options: rank: {rank} -> {rank + 1}\n"):
        fit(resumed(given, options={**given["options"], "rank": rank + 1}), progress=False)
    result = fit(
        resumed(given, options={**given["options"], "init": "kaiming"}), progress=False
    )  # lora's default, now said
    assert not any("differs" in note for note in result.metrics["notes"])


def test_metrics_that_were_lost_are_missed(given):
    halfway(given)
    metrics = Path(given["out"]) / "metrics.jsonl"
    length = metrics.stat().st_size
    cut(metrics)
    with pytest.raises(FormatError) as e:
        fit(resumed(given), progress=False)
    assert str(e.value) == (
        f"{metrics} must have {length} bytes or more, as at its checkpoint, got {length - 1}; restore it or"
        " start in another folder"
    )


# -- numbers that are not finite -----------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Makes the loss of some forward passes of the training, counted from 1, not a number."""
    from veneer.tasks.text import next_token

    real, passes = next_token.loss, iter(range(1, 1 << 30))

    def loss(model: Any, batch: Any, **options: Any) -> Any:
        value, n = real(model, batch, **options)
        return (value * float("nan"), n) if model.training and next(passes) in bad else (value, n)

    monkeypatch.setattr(next_token, "loss", loss)


def state(given: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(given["out"]) / "checkpoints" / f"step-{step:06d}" / "state.safetensors")


def test_a_step_that_is_not_finite_changes_no_bit(given, monkeypatch):
    spoil(monkeypatch, {6})  # the second micro-batch of step 3
    result = fit(Run.from_dict({**given, "steps": 4, "save_every": 1, "keep": 9}), progress=False)
    before, after, later = (state(given, n) for n in (2, 3, 4))
    assert result.metrics["skipped_steps"] == 1 and result.metrics["steps"] == 4
    trained = [k for k in before if k != "rng"]
    assert (
        len([k for k in trained if k.startswith("o.")])
        == 3 * len([k for k in trained if k.startswith("p.")])
        > 0
    )
    assert all(torch.equal(before[k], after[k]) for k in trained)
    assert not any(torch.equal(after[k], later[k]) for k in trained)
    line = next(m for m in tiny.metrics(Path(given["out"])) if m["step"] == 3)
    assert (line["loss"], line["gradient_norm"], line["skipped"]) == (None, None, "loss is nan")


def test_five_such_steps_in_a_row_end_the_training_with_the_last_good_state(given, monkeypatch):
    spoil(monkeypatch, {1, *range(5, 100)})  # step 1, then every one from step 3
    with pytest.raises(Diverged) as e:
        fit(Run.from_dict({**given, "keep": 9, "save_every": 2}), progress=False)
    assert str(e.value) == (
        "5 steps in a row were skipped, the last, step 7, because the loss is nan; the last good step is"
        " saved in"
        f" {given['out']}. Lower lr (its peak was 0.01), lengthen warmup, or use precision='fp32'"
    )
    good, last = state(given, 2), state(given, 7)
    assert all(torch.equal(good[k], last[k]) for k in good if k != "rng")
    monkeypatch.undo()
    assert fit(resumed(given, keep=9, save_every=2), progress=False).metrics["skipped_steps"] == 6
