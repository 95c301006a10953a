"""Every single-bit flip in a checkpoint of a real run is seen before anything is read from it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from support import tally, tiny
from support.resuming import Killed, assert_same, killed_at

from veneer.runs.fit import fit
from veneer.train.folder import checkpoint
from veneer.train.run import Run

SHORT = {"steps": 6, "eval_every": 3, "save_every": 2}


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("flips")


def test_every_flip_in_a_checkpoint_is_found_and_the_one_before_is_used(place, tmp_path):
    given = tiny.settings(place, **SHORT, out=str(tmp_path / "whole"))
    fit(Run.from_dict(given), progress=False)
    given["out"] = str(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 5)
        fit(Run.from_dict(given), progress=False)
    folder, draw = tmp_path / "run" / "checkpoints" / "step-000004", random.Random(0)
    kept = shutil.copytree(folder, tmp_path / "kept")
    for file in sorted(folder.iterdir()):
        size = 8 * file.stat().st_size
        for bit in draw.sample(range(size), min(size, 330 if tally.FULL else 40)):
            flip(file, bit)
            with tally.one("flips"):
                assert checkpoint.damage(folder) is not None, f"bit {bit} of {file.name}"
            shutil.copyfile(kept / file.name, file)
    assert checkpoint.damage(folder) is None
    flip(folder / checkpoint.STATE, 8 * 400)
    with tally.one("kills"):
        fit(Run.from_dict({**given, "resume": True}), progress=False)
        assert_same(given, tmp_path / "whole")
