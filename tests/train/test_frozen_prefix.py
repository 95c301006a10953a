"""Blocks below the first adapted one: no graph is made of them, and what leaves them can be kept instead
of computed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import models, tiny
from support.objectives import causal_lm
from torch import nn

import veneer
from veneer.data.pack import Segment, collate, n_tokens
from veneer.errors import ConfigError
from veneer.runs.fit import fit
from veneer.tasks.text import next_token
from veneer.train.errors import Interrupted
from veneer.train.loop.step import Learner
from veneer.train.run import Run
from veneer.train.speed import frozen_blocks, frozen_cache
from veneer.train.speed.frozen_cache import Kept
from veneer.units import size
from veneer.verbs.plan.plan import plan
from veneer.verbs.plan.text import text

UPPER = r".*\.(layers|h)\.[23]\..*"
BUILDS = {
    "llama": lambda **c: models.llama(num_hidden_layers=4, **c),
    "gpt2": lambda **c: models.gpt2(
        n_layer=4, **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **c}
    ),
}


def upper(kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    model = veneer.attach(BUILDS[kind](**config).to(dtype), "lora", to=UPPER, rank=2).train()
    models.randomise(model)
    return model


def blocks(model: nn.Module) -> nn.ModuleList:
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def windows(*lengths: tuple[int, ...], seed: int = 0) -> list[tuple[Segment, ...]]:
    draw = torch.Generator().manual_seed(seed)

    def segment(n: int) -> Segment:
        ids, labels = (torch.randint(0, models.VOCABULARY, (n,), generator=draw) for _ in range(2))
        return Segment(ids, labels, torch.ones(n, dtype=torch.int64))

    return [tuple(map(segment, own)) for own in lengths]


SOME = windows((5, 7), (9,), (3, 4, 2))


@pytest.mark.parametrize("kind", BUILDS)
def test_nothing_is_kept_for_the_backward_below_the_first_adapted_block(kind):
    model, counts, inside = upper(kind), dict.fromkeys(range(4), 0), []
    for i, block in enumerate(blocks(model)):
        block.register_forward_pre_hook(lambda *a, i=i: inside.append(i))
        block.register_forward_hook(lambda *a: inside.pop() * 0 or None)

    def pack(t: torch.Tensor) -> torch.Tensor:
        if inside:
            counts[inside[-1]] += 1
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _ = next_token.loss(model, collate(SOME, 0))
    loss.backward()
    assert counts[0] == counts[1] == 0 and counts[2] > 0 and counts[3] > 0


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_those_of_the_whole_model(kind, dtype, tolerance, tmp_path, monkeypatch):
    model = upper(kind, dtype)
    prefix = frozen_blocks.look(model, next_token.inputs(collate([SOME[0][:1]], 0)), 5)
    assert (prefix.first, prefix.width, prefix.dtype) == (2, 32, dtype)
    store, batch = Kept(model, prefix, causal_lm(), SOME, tmp_path, {}), collate(SOME, 0)
    loss, _ = next_token.loss(model, batch)
    loss.backward()
    loss = loss.detach()
    expected, calls = gradients(model), []
    for _ in range(2):
        with store.passing(SOME, 12):
            ours, _ = next_token.loss(model, batch)
            ours.backward()
        assert float((ours.detach() - loss).abs() / loss.abs()) <= tolerance
        for name, g in gradients(model).items():
            assert float((g - expected[name]).norm() / expected[name].norm()) <= tolerance, name
        monkeypatch.setattr(store, "_computed", lambda window: calls.append(window))
    assert (
        not calls
        and next(iter(blocks(model))) is prefix.stack[0]
        and "forward" not in prefix.stack[0].__dict__
    )
    assert (tmp_path / "frozen/hidden.raw").stat().st_size == prefix.bytes(n_tokens(SOME))


def test_the_frozen_blocks_are_computed_once_for_each_window_and_again_where_the_disk_lost_them(tmp_path):
    model = upper("llama")
    prefix, calls = frozen_blocks.look(model, next_token.inputs(collate([SOME[0][:1]], 0)), 5), []
    model.model.layers[0].mlp.register_forward_hook(lambda *a: calls.append(1))
    key = {"base": "one", "length": 12}
    first = Kept(model, prefix, causal_lm(), SOME, tmp_path, key)
    values = [first.of(w).clone() for w in SOME]
    assert (
        len(calls) == 3
        and all(torch.equal(first.of(w), v) for w, v in zip(SOME, values, strict=True))
        and len(calls) == 3
    )
    again = Kept(model, prefix, causal_lm(), SOME, tmp_path, key)
    assert all(torch.equal(again.of(w), v) for w, v in zip(SOME, values, strict=True)) and len(calls) == 3
    again._hidden[13].zero_()  # a page of the second window that never reached the disk
    assert torch.equal(again.of(SOME[1]), values[1]) and len(calls) == 4
    other = Kept(model, prefix, causal_lm(), SOME, tmp_path, {**key, "base": "two"})
    assert torch.equal(other.of(SOME[0]), values[0]) and len(calls) == 5


# -- what cannot be kept -------------------------------------------------------------------------------------


class Crossed(nn.Module):
    """Every block reads what the first one was given, too."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: torch.Tensor, first: list[torch.Tensor]) -> torch.Tensor:
        first.append(x)
        return self.own(x) + first[0]


class Stack(nn.Module):
    def __init__(self, pairs: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, 8)
        self.layers = nn.ModuleList(Crossed(nn.Linear(8, 8)) for _ in range(3))
        self.head, self.pairs = nn.Linear(8, 97), pairs

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        x, first = self.embed(input_ids), []
        for layer in self.layers:
            x = layer(x, first)
        return SimpleNamespace(logits=self.head(x))


def test_models_and_settings_that_do_not_allow_it_are_refused(tmp_path, monkeypatch):
    ids = SOME[0][0].inputs[None]

    def refusal(model: nn.Module) -> str:
        with pytest.raises(ConfigError) as e:
            frozen_blocks.look(model, {"input_ids": ids, "use_cache": False}, ids.shape[1])
        return str(e.value)

    assert "of 4 the first is adapted; adapt upper ones only, with to= or exclude=" in refusal(
        veneer.attach(BUILDS["llama"]())
    )
    assert "LlamaForCausalLM: none of its blocks is trained" in refusal(
        veneer.attach(BUILDS["llama"](), to=["lm_head"])
    )
    assert "Linear: it lacks a stack of similar blocks" in refusal(nn.Linear(2, 2))
    below = veneer.attach(
        BUILDS["llama"](), to=[*(f"layers.3.mlp.{n}_proj" for n in ("up", "down")), "embed_tokens"], rank=2
    )
    models.randomise(below)
    assert "something below block 3 is trained (an embedding?)" in refusal(below)
    assert "two passes differ behind block 1; does the base have dropout?" in refusal(
        upper("gpt2", embd_pdrop=0.5)
    )
    crossed = veneer.attach(Stack(), to=["layers.2.own"], rank=2)
    assert "read more of the lower ones than the last hidden states" in refusal(crossed)
    monkeypatch.setattr(frozen_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(ConfigError, match=r"needs 3 GB in .*, but 1 MB are free; choose another out"):
        frozen_cache.check_room(tmp_path / "none" / "yet", 3 * 10**9)
    for changed, message in (
        ({"stream": True, "steps": 3}, "which stream lacks; leave one of them out"),
        ({"method": "full"}, "method 'full' trains all: leave it out"),
    ):
        with pytest.raises(ConfigError, match=message):
            Run.from_dict({"data": "a.txt", "cache_frozen": True, **changed})
    with pytest.raises(ConfigError, match="cache_frozen needs one run a pass, and here all share it"):
        veneer.fit_many([Run.from_dict({"data": "a.txt", "cache_frozen": True})], progress=False)


# -- in a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("frozen")


def settings(place: Path, out: Path, **changed: Any) -> dict[str, Any]:
    own = {"to": r".*layers\.1\..*", "packing": False, "steps": 14, "cache_frozen": True, **changed}
    return tiny.settings(place, out=str(out), **own)


def trained(place: Path, out: Path, **changed: Any) -> tuple[list[Any], dict[str, Any]]:
    fit(Run.from_dict(settings(place, out, **changed)), progress=False)
    return tiny.metrics(out), json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_learns_the_same_and_leaves_nothing_behind(place, tmp_path, packing):
    (ours, told), (plain, _) = (
        trained(place, tmp_path / str(on), cache_frozen=on, packing=packing) for on in (True, False)
    )
    for a, b in zip(ours, plain, strict=True):
        assert a.keys() == b.keys()
        for name in {"loss", "gradient_norm", "valid_bpb"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    assert not (tmp_path / "True" / "frozen").exists()
    assert any(
        "the hidden states of the 1 blocks below the first adapted one are cached until the end" in note
        for note in told["notes"]
    )


def test_a_run_that_is_stopped_and_resumed_has_the_same_bits(place, tmp_path, monkeypatch):
    trained(place, tmp_path / "whole")
    real, steps = Learner.step, iter(range(1, 99))

    def step(*args: Any) -> Any:
        if next(steps) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Learner, "step", step)
        trained(place, tmp_path / "part")
    assert (tmp_path / "part/frozen/hidden.raw").exists()
    trained(place, tmp_path / "part", resume=True)
    ours, theirs = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("part", "whole")
    )
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())
    assert tiny.metrics(tmp_path / "part") == tiny.metrics(tmp_path / "whole")


def test_a_plan_tells_the_size_and_a_single_pass_is_said_to_gain_nothing(place, tmp_path):
    _, told = trained(place, tmp_path / "once", steps=2)
    found = plan(Run.from_dict(settings(place, tmp_path / "plan")), probe=False, progress=False)
    tokens = json.loads((tmp_path / "once/config.json").read_text())["data"]["train"]["tokens"]
    width = json.loads((place / "base/config.json").read_text())["hidden_size"]
    assert found.as_dict()["cache_frozen_bytes"] == 4 * width * tokens
    assert (
        f"--cache-frozen: {size(4 * width * tokens)} on disk" in text(found)
        and not (tmp_path / "plan").exists()
    )
    assert any(
        "no window is read twice in this run, so cache_frozen saves nothing" in note for note in told["notes"]
    )
