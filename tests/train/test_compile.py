"""Compiled training: the same function, the same bits when resumed, few graphs, and a plain word where it
cannot be."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import llama
from support.objectives import causal_lm
from support.tiny import base, metrics, settings, train
from torch import nn

import veneer
from veneer.data.pack import Segment, collate
from veneer.errors import ConfigError
from veneer.ops.attention.short import attend
from veneer.tasks.text import next_token
from veneer.train.run import Run
from veneer.train.speed import compile_settings, compiling


def test_auto_is_on_for_long_runs_only():
    model = nn.Linear(1000, 1000, bias=False)  # 1e6 parameters: 4e6 operations a token, 1e11 a second
    ten_minutes = 600 * 1e11 / 4e6
    assert not compiling.is_long(model, 0.9 * ten_minutes, torch.device("cpu"))
    assert compiling.is_long(model, 1.1 * ten_minutes, torch.device("cpu"))
    assert not compiling.is_long(model, 1.1 * ten_minutes, torch.device("cuda"))


def test_batches_have_few_widths():
    assert compiling.widths(256, packing=True) == (64, 128, 256)
    assert compiling.widths(256, packing=False) == (32, 64, 96, 128, 160, 192, 224, 256)
    assert compiling.widths(5, packing=True) == (2, 3, 5)


@pytest.mark.parametrize(("longest", "width"), [(3, 4), (4, 4), (5, 8), (9, 9)])
def test_a_batch_is_as_wide_as_the_least_width_that_holds_it(longest, width):
    ids = torch.arange(longest)
    one, short = (Segment(ids, ids, ids),), (Segment(ids[:2], ids[:2], ids[:2]),)
    batch = collate([one, short], 0, (4, 8))
    assert batch["input_ids"].shape == (2, width)
    assert batch["labels"][1].tolist() == [0, 1] + [-100] * (width - 2)


def test_a_graph_that_holds_a_derivative_of_our_own_is_found_again():
    """And is not taken for one that has another derivative: PyTorch leaves such graphs out of its cache
    unless told."""
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 1, 2, 6, 8, generator=draw).requires_grad_()
    found = []
    for scale in (0.3, 0.3, 0.4):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

        def objective(model, batch, smoothing, scale=scale):
            return torch.compile(lambda t: attend(*t, scale=scale))(qkv).sum(), 1

        loss, _ = compile_settings.lean(objective)(nn.Identity(), {})
        (gradient,) = torch.autograd.grad(loss, qkv)
        plain = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, scale=scale)
        torch.testing.assert_close(gradient, torch.autograd.grad(plain.sum(), qkv)[0])
        found.append(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
    assert found[1] == 1


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_blocks_that_are_computed_again_give_the_same_gradients_and_keep_less():
    model = veneer.attach(llama(), "dora", rank=2)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    batch = {
        k: torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(1))
        for k in ("input_ids", "labels")
    }
    found = []
    for wanted in (False, True):
        compiling.recompute(model, wanted)
        objective = compiling.prepare(model, causal_lm(), batch)
        model.train()
        kept = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss, _ = objective(model, batch)
        model.zero_grad()
        loss.backward()
        found.append((loss.detach(), gradients(model), kept))
    (plain, expected, much), (again, ours, little) = found
    torch.testing.assert_close(again, plain)
    assert ours.keys() == expected.keys()
    for name, g in ours.items():
        torch.testing.assert_close(g, expected[name])
    assert little < much / 2


def test_a_model_that_cannot_compute_its_blocks_again_is_refused():
    with pytest.raises(
        ConfigError, match=r"a Linear cannot recompute its blocks; use gradient_checkpointing=False"
    ):
        compiling.recompute(nn.Linear(2, 2), True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    base(folder)
    return folder


def fitted(place: Path, out: Path, **changed: Any) -> dict[str, Any]:
    veneer.fit(Run(**{**settings(place), "out": str(out), "report": False, **changed}), progress=False)
    return json.loads((out / "results.json").read_text())


def test_a_compiled_training_computes_what_the_plain_one_does(place, tmp_path):
    short: dict[str, Any] = {
        "options": {"rank": 4},
        "steps": 6,
    }  # without dropout, whose numbers a compiler draws in its own way
    plain = fitted(place, tmp_path / "plain", compile="off", **short)
    compiled = fitted(place, tmp_path / "compiled", compile="on", **short)
    assert any(n.startswith("compiled in ") for n in compiled["notes"])
    assert not any(n.startswith("compiled in ") for n in plain["notes"])
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled"), strict=True):
        assert a.keys() == b.keys()
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-4)


def test_a_compiled_training_that_is_resumed_computes_the_same_bits(place, tmp_path):
    given = {
        **settings(place),
        "options": {"rank": 4},
        "steps": 6,
        "compile": "on",
        "save_every": 2,
        "out": str(tmp_path / "run"),
    }
    assert train(given, signal_at=(3, signal.SIGINT)) == 130
    fitted(
        place, tmp_path / "run", resume=True, **{k: v for k, v in given.items() if k not in ("out", "report")}
    )
    whole = {k: v for k, v in given.items() if k not in ("out", "report")}
    fitted(place, tmp_path / "whole", **whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    ours, other = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")
    )
    assert ours == other


def test_without_a_compiler_on_is_refused_and_auto_goes_on(place, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "missing", lambda device: "a C++ compiler (g++)")
    with pytest.raises(
        ConfigError,
        match=r"compile='on' needs a C\+\+ compiler \(g\+\+\), not found here; install it, or use",
    ):
        fitted(place, tmp_path / "on", compile="on")
    monkeypatch.setattr(compiling, "is_long", lambda *given: True)
    notes = fitted(place, tmp_path / "auto")["notes"]
    assert not any("compiled" in n for n in notes)
    assert (
        "steps of this run could be shorter: torch.compile needs a C++ compiler (g++), not found here"
        in notes
    )
    assert not any("torch.compile" in n for n in fitted(place, tmp_path / "off", compile="off")["notes"])


def test_what_cannot_be_compiled_is_said_and_auto_goes_on_without(place, tmp_path, monkeypatch):
    def broken(*given: Any) -> Any:
        raise RuntimeError("no kernel\nand much more")

    monkeypatch.setattr(compiling, "compiled_kernel", lambda: broken)
    monkeypatch.setattr(compiling, "is_long", lambda *given: True)
    notes = fitted(place, tmp_path / "auto")["notes"]
    assert any(
        "torch.compile cannot compile this model: no kernel; use compile='off'; continues without" in n
        for n in notes
    )
    with pytest.raises(ConfigError, match="cannot compile this model: no kernel"):
        fitted(place, tmp_path / "on", compile="on")


def test_the_compiler_is_looked_for(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiling.missing(torch.device("cpu")) == "a C++ compiler (no-such-compiler)"


def test_a_first_step_changes_nothing():
    model = veneer.attach(llama(), "lora", rank=2, dropout=0.3)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    batch = {k: torch.zeros(1, 4, dtype=torch.int64) for k in ("input_ids", "labels")}
    state = torch.get_rng_state()
    compiling.warm_up(model, next_token.loss, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not gradients(model) and not model.training
