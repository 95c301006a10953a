"""A training in several processes of torch.distributed is the training of one."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import pytest
import torch
from support import shared_runs, shared_steps, tiny
from support.shared_steps import bound, largest, of_method, optimisers
from support.torchrun import torchrun

from veneer import methods, optim
from veneer.data.order.order import Order
from veneer.errors import ConfigError
from veneer.train import group
from veneer.train.world import ALONE, World

STEP, RUN = "support.shared_steps:train", "support.shared_runs:until"


@pytest.mark.parametrize("optimiser", optim.available())
def test_optimisers_split_or_repeat_the_batch(optimiser, two, four):
    own = of_method("full" if optimiser == "galore" else "lora")
    one = shared_steps.train(ALONE, optimiser, **own)
    same = shared_steps.train(ALONE, optimiser, **own, steps=4, same=True)
    for ranks in (two, four):
        split = ranks.call(STEP, optimiser, **own)
        assert largest(one, split[0]) <= 1e-6
        assert len({f["hash"] for f in split}) == 1  # all processes hold the same parameters
        assert split[0]["wire"] <= 1.1
        for found in ranks.call(STEP, optimiser, **own, steps=4, same=True):
            assert found["losses"] == same["losses"] and found["hash"] == same["hash"]


@pytest.mark.parametrize("method", ["dora", "lokr", "oft", "ia3", "prefix", "bottleneck", "shira"])
def test_methods_split_the_batch(method, two):
    one = shared_steps.train(ALONE, "adamw", **of_method(method))
    found = two.call(STEP, "adamw", **of_method(method))
    assert largest(one, found[0]) <= 1e-6 and found[0]["hash"] == found[1]["hash"]
    assert found[0]["wire"] <= 1.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optimiser"), [(m, o) for m in methods.available() for o in optimisers(m)]
)
def test_every_method_and_optimiser_over_fifty_steps(method, optimiser, two, four):
    one = shared_steps.train(ALONE, optimiser, **of_method(method), steps=50)
    same = shared_steps.train(ALONE, optimiser, **of_method(method), same=True)
    for ranks in (two, four):
        found = ranks.call(STEP, optimiser, **of_method(method), steps=50)
        assert len({f["hash"] for f in found}) == 1
        assert largest(one, found[0], 10) <= 1e-6, f"{largest(one, found[0], 10):.1e} in {ranks.size}"
        assert largest(one, found[0]) <= bound(method, optimiser), (
            f"{largest(one, found[0]):.1e} in {ranks.size}"
        )
        assert ranks.call(STEP, optimiser, **of_method(method), same=True)[0]["losses"] == same["losses"]


def test_all_begin_with_the_start_of_the_first(four):
    found = four.call("support.shared_runs:start")
    assert all(error == "" for _, error in found)
    own, _ = shared_runs.start(ALONE)
    assert all(torch.equal(t, own) for t, _ in found) and float(own.norm()) > 0


@pytest.mark.parametrize(("changed", "word"), [("weight", "weights"), ("data", "texts")])
def test_a_process_with_other_weights_or_texts_is_refused_by_all(changed, word, four):
    errors = [error for _, error in four.call("support.shared_runs:start", changed=changed)]
    assert all(f"{word} of process 3 differ from those of process 0" in e for e in errors)


class Place(World):
    """A rank of several, without the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum(self, value: Any) -> Any:
        raise AssertionError("not in this test")

    def barrier(self) -> None:
        raise AssertionError("not in this test")


@pytest.mark.parametrize("sizes", [None, [i % 5 + 1 for i in range(37)]])
def test_every_number_of_processes_sees_one_order(sizes):
    order = Order(range(37), 4, 2, total=3 * 37, seed=5, sizes=sizes)
    counts: collections.Counter[int] = collections.Counter()
    for step in range(order.steps):
        micro = order.step(step)
        counts.update(e for some in micro for e in some)
        for size, whole in itertools.product((2, 3, 4), (False, True)):
            shares = [Place(rank, size).shares(micro, whole) for rank in range(size)]
            dealt = sorted(e for share in shares for some in share for e in some)
            assert dealt == sorted(e for some in micro for e in some)
    assert set(counts.values()) == {3} and len(counts) == 37  # every example once an epoch


def test_a_run_goes_on_in_one_two_four_and_one_processes(tmp_path, two, four):
    """The loss curve and the examples of every step are those of one process; none is lost or doubled."""
    settings: dict[str, Any] = dict(
        options={"rank": 4}, batch=4, accumulate=2, steps=16, eval_every=4, resume=True, lr=3e-3
    )
    given = tiny.settings(tmp_path, **settings)
    seen: dict[int, list[str]] = collections.defaultdict(list)

    def keep(found: list[list[tuple[int, list[str]]]]) -> None:
        for step, examples in itertools.chain(*found):
            seen[step] += examples

    alone = {**given, "out": str(tmp_path / "alone")}
    expected = dict(shared_runs.until(ALONE, alone, 99))
    keep([shared_runs.until(ALONE, given, 3)])
    keep(two.call(RUN, given, 7))
    keep(four.call(RUN, given, 11))
    keep([shared_runs.until(ALONE, given, 99)])
    assert {step: sorted(some) for step, some in seen.items()} == {
        step: sorted(some) for step, some in expected.items()
    }
    one, other = tiny.metrics(tmp_path / "alone"), tiny.metrics(tmp_path / "run")
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for a, b in zip(one, other, strict=True):
        for key in {"loss", "gradient_norm", "valid_bpb"} & a.keys():
            assert b[key] == pytest.approx(a[key], abs=1e-5), (a["step"], key)
        for key in {"labels", "tokens", "lr"} & a.keys():
            assert b[key] == a[key]


def test_a_task_that_compares_examples_needs_whole_batches():
    from veneer import tasks
    from veneer.train.run import Run
    from veneer.train.same_start import check_batches

    task: Any = tasks.get("embeddings")
    run = Run(data="-", task="embeddings", batch=8, accumulate=3)
    with pytest.raises(ConfigError, match="set accumulate to a multiple of 2, got 3"):
        check_batches(run, task, Place(0, 2))
    plain: Any = tasks.get("causal-lm")
    with pytest.raises(ConfigError, match="batch must be 4 or more for 4 processes"):
        check_batches(Run(data="-", batch=3), plain, Place(0, 4))


def test_a_device_that_processes_cannot_share_is_refused(monkeypatch):
    own = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="need a device each, got device='cuda:1'"), group.joined("cuda:1"):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="process 1: each process of a machine needs its own GPU, got 1"):
        with group.joined("cuda"):
            pass


def test_the_command_line_under_torchrun_is_the_run_of_one(tmp_path):
    given = tiny.settings(tmp_path, options={"rank": 4}, batch=4, accumulate=1, steps=5, lr=3e-3)
    process = torchrun(given)
    shared_runs.until(ALONE, {**given, "out": str(tmp_path / "alone")}, 99)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out.count("learned") == 1  # one process speaks
    one, other = tiny.metrics(tmp_path / "alone"), tiny.metrics(tmp_path / "run")
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for a, b in zip(one, other, strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-6)
