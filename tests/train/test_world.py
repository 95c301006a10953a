"""Several processes that share every batch make the steps that one process makes of the whole batch."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import gloo_world, models, tiny
from support.objectives import causal_lm
from torch import Tensor

import veneer
from veneer import optim
from veneer.data.pack import IGNORED, Segment, Window
from veneer.errors import DataError
from veneer.optim.base import groups
from veneer.runs.fit import fit
from veneer.tasks.text import next_token
from veneer.train.loop.step import Learner, Outcome
from veneer.train.run import Run
from veneer.train.world import ALONE, World


class Shared:
    """The meeting place of the threads of one world."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)


class Threads(World):
    """Threads that pass for processes."""

    def __init__(self, rank: int, shared: Shared) -> None:
        self.rank, self.size, self.shared = rank, len(shared.values), shared

    def sum(self, value: Any) -> Any:
        self.shared.values[self.rank] = value.clone() if isinstance(value, Tensor) else value
        self.barrier()
        total = sum(self.shared.values[1:], self.shared.values[0])
        self.barrier()  # nobody may put the next value before all have read these
        return total

    def barrier(self) -> None:
        self.shared.barrier.wait()


def windows() -> list[Window]:
    """Four windows of unequal lengths and masks, so that a mean of the processes' means would be wrong."""
    draw, found = torch.Generator().manual_seed(3), []
    for n, masked in ((12, 2), (7, 6), (10, 0), (4, 1)):
        inputs, labels = torch.randint(models.VOCABULARY, (2, n), generator=draw)
        labels[:masked] = IGNORED
        found.append((Segment(inputs, labels, torch.ones(n)),))
    return found


def learner(model: torch.nn.Module, optimiser: str, clip: float, world: World) -> Learner:
    parts = groups.of_adapter(model, "default")
    built = optim.make(optimiser).build(optim.Trained(parts))
    return Learner(model, parts, built, causal_lm(), next_token.loss, clip, 0.01, world=world)


def in_threads(work: Any, size: int) -> list[Any]:
    """Returns what work(rank) returned in each of the threads; raises their first error."""
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except BaseException as e:
            found[rank] = e

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    error = next((f for f in found if isinstance(f, BaseException)), None)
    if error is not None:
        raise error
    return found


@pytest.mark.parametrize("optimiser", ["adamw", "loraplus", "lorapro"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_two_processes_step_as_one_does_with_the_joined_batch(optimiser, clip):
    base = veneer.attach(models.llama().double(), rank=2)
    models.randomise(base)
    every, shared = windows(), Shared(2)

    def steps(world: World, micro: list[list[Window]]) -> tuple[list[Outcome], list[Tensor]]:
        own = learner(copy.deepcopy(base), optimiser, clip, world)
        return [own.step(micro, 0.02) for _ in range(3)], [p.parameter.detach() for p in own.parts]

    outcomes, expected = steps(ALONE, [every])
    for found, parameters in in_threads(lambda r: steps(Threads(r, shared), [every[r::2]]), 2):
        for ours, theirs in zip(found, outcomes, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-10)
            assert ours.norm == pytest.approx(theirs.norm, rel=1e-8)
            assert (ours.labels, ours.tokens, ours.skipped) == (theirs.labels, theirs.tokens, None)
        for a, b in zip(parameters, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_process_without_labels_takes_part_and_none_at_all_is_refused():
    base = veneer.attach(models.llama().double(), rank=2)
    masked = (Segment(torch.tensor([1, 2]), torch.tensor([IGNORED, IGNORED]), torch.zeros(2)),)
    every, shared = [windows()[0], masked], Shared(2)

    def step(rank: int, some: list[Window]) -> Outcome:
        return learner(copy.deepcopy(base), "adamw", 1.0, Threads(rank, shared)).step([some], 0.01)

    alone = learner(copy.deepcopy(base), "adamw", 1.0, ALONE).step([every], 0.01)
    for found in in_threads(lambda r: step(r, [every[r]]), 2):
        assert found.loss == pytest.approx(alone.loss, rel=1e-10) and found.labels == alone.labels == 10
    with pytest.raises(DataError, match="no token of this batch is learned"):
        in_threads(lambda r: step(r, [masked]), 2)


def test_a_loss_that_is_not_finite_in_one_process_stops_the_step_of_all():
    base = veneer.attach(models.llama(), rank=2)
    every, shared = windows(), Shared(2)

    def step(rank: int) -> Outcome:
        own = learner(copy.deepcopy(base), "adamw", 1.0, Threads(rank, shared))
        if rank == 1:
            own = own._replace(objective=lambda *a, **k: (next_token.loss(*a, **k)[0] * float("nan"), 1))
        return own.step([every[rank::2]], 0.01)

    assert [o.skipped for o in in_threads(step, 2)] == ["loss is nan"] * 2


def test_a_whole_run_in_two_processes_is_the_run_of_one(tmp_path):
    """Files are written once; a run that is stopped by a checkpoint's end goes on in both."""
    given = tiny.settings(tmp_path, batch=4, accumulate=1, options={"rank": 4}, steps=9, save_every=3)
    fit(Run.from_dict({**given, "out": str(tmp_path / "one")}), progress=False)
    own = {**given, "out": str(tmp_path / "two"), "report": True}
    assert gloo_world.train(own, str(tmp_path / "meeting")) == [0, 0]
    one, two = (tiny.metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    tensors = [load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("one", "two")]
    for key, t in tensors[0].items():
        assert float((tensors[1][key] - t).norm()) <= 1e-3 * float(t.norm()), key
    assert (tmp_path / "two" / "report.html").is_file()
    _resumes(tmp_path, own)


def _resumes(place: Path, given: dict[str, Any]) -> None:
    """A run whose last checkpoint and result are gone goes on from the one before, in both processes."""
    out = Path(given["out"])
    whole = json.loads((out / "results.json").read_text())
    before = tiny.metrics(out)
    (out / "results.json").unlink()
    for step in (out / "checkpoints").glob("step-00000[789]"):
        for file in step.iterdir():
            file.unlink()
        step.rmdir()
    assert gloo_world.train({**given, "resume": True}, str(place / "again")) == [0, 0]
    assert tiny.metrics(out) == before
    assert json.loads((out / "results.json").read_text())["after"] == whole["after"]
