"""A base that is divided among processes trains the adapter that a whole one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import experts, shared_runs, shared_steps, tiny
from support.shared_steps import OPTIONS, bound, largest, of_method, optimisers
from torch import nn

import veneer
from veneer import methods, optim, tasks
from veneer.errors import ConfigError
from veneer.train.loop import room
from veneer.train.run import Run
from veneer.train.world import ALONE

WHOLE = "support.shared_runs:whole"


def settings(folder: Any, **changed: Any) -> dict[str, Any]:
    # 19 examples in batches of 4: one process has no share of the last one
    given = tiny.settings(folder, options={"rank": 4}, batch=4, accumulate=1, steps=None, epochs=1, lr=3e-3)
    return {**given, "eval_every": 5, **changed}


OTHERS = [m for m in methods.available() if m not in ("lora", "dora", "full")]


@pytest.mark.parametrize(
    "method", ["lora", "dora", *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)]
)
def test_a_divided_base_learns_what_a_whole_one_does(method, tmp_path, two):
    own: dict[str, Any] = {"options": OPTIONS.get(method, {"rank": 4} if method in ("lora", "dora") else {})}
    if "to" in own["options"]:
        own["to"] = own["options"].pop("to")
    _alike(tmp_path, two, settings(tmp_path, method=method, **own), 0.9)
    if method in ("lora", "dora"):
        _opens_in_peft(tmp_path)


OPTIMISERS = [o for o in optim.available() if o != "galore"]  # it trains the base


@pytest.mark.parametrize(
    "optimiser", [o if o == "lorapro" else pytest.param(o, marks=pytest.mark.slow) for o in OPTIMISERS]
)
def test_optimisers_on_a_divided_base(optimiser, two):
    one = shared_steps.train(ALONE, optimiser, lr=1e-3)
    found = two.call("support.shared_steps:train", optimiser, divided=True, lr=1e-3)
    assert largest(one, found[0]) <= 1e-6 and found[0]["hash"] == found[1]["hash"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optimiser"), [(m, o) for m in ("lora", "dora", *OTHERS) for o in optimisers(m)]
)
def test_every_method_and_optimiser_on_a_divided_base_over_fifty_steps(method, optimiser, two):
    own: dict[str, Any] = {**of_method(method), "steps": 50}
    one = shared_steps.train(ALONE, optimiser, **own)
    found = two.call("support.shared_steps:train", optimiser, **own, divided=True)
    assert found[0]["hash"] == found[1]["hash"]
    assert largest(one, found[0], 10) <= 1e-6, f"{largest(one, found[0], 10):.1e}"
    assert largest(one, found[0]) <= bound(method, optimiser), f"{largest(one, found[0]):.1e}"


def test_a_base_divided_among_four_processes(tmp_path, four):
    _alike(tmp_path, four, settings(tmp_path, eval_every=99), 0.75)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantised_weights_are_divided_as_they_are_stored(format, tmp_path, two):
    _alike(tmp_path, two, settings(tmp_path, quantise=format), 0.9)


def test_fused_experts_are_divided(tmp_path, two):
    given = settings(tmp_path, model=str(tmp_path / "experts"))
    sizes = {"vocab_size": len(tiny.tokenizer()), "max_position_embeddings": 128}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "SIZES", {**experts.SIZES, **sizes})
        experts.model("mixtral").save_pretrained(tmp_path / "experts")
    tiny.tokenizer().save_pretrained(tmp_path / "experts")
    _alike(tmp_path, two, given, 0.85)


def _alike(tmp_path: Any, ranks: Any, given: dict[str, Any], share: float) -> None:
    """Trains on a whole base and on a divided one. share: most of the base's numbers that a process holds."""
    shared_runs.whole(ALONE, {**given, "out": str(tmp_path / "alone")})
    for held, total in ranks.call(WHOLE, {**given, "shard": True}):
        assert 0 < held < share * total  # embeddings, head and adapter are whole
    one, other = tiny.metrics(tmp_path / "alone"), tiny.metrics(tmp_path / "run")
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for a, b in zip(one, other, strict=True):
        for key in {"loss", "gradient_norm", "valid_bpb"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-6, abs=2e-6), (a["step"], key)


def _opens_in_peft(folder: Any) -> None:
    """Plain PEFT computes from the divided run's folder what Veneer does, and what a whole run's gives."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    logits = []
    for name in ("alone", "run"):
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(folder / name / "adapter")).eval()
        with torch.no_grad():
            logits.append(model(torch.arange(24)[None]).logits)
            if name == "run":
                plain = base.unload() if hasattr(base, "unload") else model.unload()
                assert not torch.equal(plain(torch.arange(24)[None]).logits, logits[-1])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-4)
    own = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    veneer.load(own, folder / "run" / "adapter")
    with torch.no_grad():
        ours = own.eval()(torch.arange(24)[None]).logits
    assert float((ours - logits[1]).norm() / logits[1].norm()) <= 1e-5


def test_shard_alone_or_with_a_changed_base_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="divides the base among processes, got 1"):
        shared_runs.whole(ALONE, settings(tmp_path, shard=True))
    with pytest.raises(
        ConfigError, match=r"needs the whole base for cache_frozen(.|\n)*method 'full' trains it"
    ):
        Run(data="-", method="full", shard=True, cache_frozen=True)
    with pytest.raises(ConfigError, match="needs the whole base for init"):
        Run(data="-", shard=True, quantise="nf4", options={"init": "loftq"})


class Short(nn.Module):
    """A model that fits so many rows, and else lacks memory as PyTorch says it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.seen = rows, []

    def loss(self, objective: Any) -> Any:
        def own(model: nn.Module, batch: Any, *, smoothing: float = 0.0) -> Any:
            n = len(next(iter(batch.values())))
            self.seen.append(n)
            if n > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return objective(model, batch, smoothing=smoothing)

        return own


def test_a_lack_of_memory_halves_the_passes_and_keeps_the_gradient():
    from support import shared_steps

    said: list[str] = []
    short, held = Short(2), room.Room(said.append)
    whole = shared_steps.train(ALONE, "adamw", steps=6)
    cut = shared_steps.train(
        ALONE,
        "adamw",
        steps=6,
        change=lambda own: own._replace(room=held, objective=short.loss(own.objective)),
    )
    assert said == [
        "out of memory with 4 examples in a pass; goes on with 2, in more passes a step: the gradient stays"
        " the same"
    ]
    assert short.seen == [4, *[2] * 24]  # it is remembered
    assert max(abs(a - b) for a, b in zip(whole["losses"], cut["losses"], strict=True)) <= 1e-6


def test_one_example_too_many_ends_with_advice():
    from support import shared_steps

    with pytest.raises(room.NoRoom, match="one example does not fit the memory"):
        shared_steps.train(
            ALONE,
            "adamw",
            change=lambda own: own._replace(room=room.Room(print), objective=Short(0).loss(own.objective)),
        )


def test_every_task_says_if_its_loss_compares_examples():
    assert [name for name in tasks.available() if tasks.get(name).COMPARES] == ["embeddings", "kto"]
