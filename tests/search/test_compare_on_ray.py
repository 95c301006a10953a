"""compare --engine ray: tasks of Ray share the journal and come to the table of one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import tiny

from veneer.errors import ConfigError, VeneerError
from veneer.runs.on_ray import cluster
from veneer.search.compare import on_ray
from veneer.search.compare.compare import compare
from veneer.search.compare.settings import Comparison
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

NOT_SHARED = ("lr", "eval_every", "save_every", "out", "report")


def run_of(folder: Path) -> Run:
    own = {"options": {"rank": 2}, "steps": 8, "accumulate": 1, "eval_windows": 2, "compile": "off"}
    given = tiny.settings(folder, **own, test=str(folder / "valid.txt"))
    return Run.from_dict({k: v for k, v in given.items() if k not in NOT_SHARED})


def small(folder: Path, **changed) -> Comparison:
    own = {"methods": ("lora",), "seeds": 2, "durations": (0.5, 0.25), "together": 1}
    return Comparison(**{**own, "out": str(folder), **changed})


def scores(found):
    return {row["label"]: (row["lr"], row["values"]) for row in found["methods"]}


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.ray
def test_two_tasks_find_what_one_process_finds(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = run_of(tmp_path)
    alone = compare(run, small(tmp_path / "alone"), progress=False)
    ours = compare(run, small(tmp_path / "ours", engine="ray", workers=2))
    said = capfd.readouterr().err
    assert "Ray starts 2 tasks" in said
    assert scores(ours) == scores(alone) and ours["best"] == alone["best"]
    whole = [line for line in said.splitlines() if " of the steps in " in line]
    assert len(whole) == len({line.partition(" of the steps")[0] for line in whole}) > 5


class Ray:
    """As much of Ray as follows tasks: the results are there at once."""

    exceptions = SimpleNamespace(RayError=OSError)

    def __init__(self, lost: str = "") -> None:
        self.lost = lost

    def wait(self, going, timeout):
        return going[:1], going[1:]

    def get(self, refs):
        if self.lost and isinstance(refs, list):
            raise OSError(self.lost)
        return refs


DESK = SimpleNamespace(news=SimpleNamespace(remote=lambda: ([], None)))


def test_an_error_of_a_task_is_raised_as_it_was():
    error = (ConfigError, ("rates must be 5 or more, got 4",), {})
    on_ray._followed(Ray(), [None, None], DESK, Voice(False))
    with pytest.raises(ConfigError, match=r"^rates must be 5 or more, got 4$"):
        on_ray._followed(Ray(), [None, error], DESK, Voice(False))


def test_a_task_that_is_lost_too_often_is_named():
    with pytest.raises(VeneerError, match=r"^a task of Ray was lost 3 times: killed; repeat the command$"):
        on_ray._followed(Ray("worker\n killed\n"), [None], DESK, Voice(False))


def test_a_comparison_in_tasks_needs_ray(tmp_path, monkeypatch):
    def missing():
        raise ConfigError("engine='ray' needs Ray Train: pip install 'veneer[ray]'")

    monkeypatch.setattr(cluster, "module", missing)
    with pytest.raises(ConfigError, match="needs Ray Train"):
        compare(run_of(tmp_path), small(tmp_path / "c", engine="ray"), progress=False)
