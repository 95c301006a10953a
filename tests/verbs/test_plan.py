"""The plan: counts against closed forms, shapes against torch's own counters and a real step, and what it
says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support import models, tiny
from support.objectives import causal_lm
from support.step_memory import SHAPE, batch, real_step
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from veneer.adapt.attach import attach
from veneer.adapt.attached import base_parameters
from veneer.adapt.switch import using
from veneer.analyse.cost import process_memory, simulate
from veneer.analyse.cost.memory import Live, Saved, n_bytes
from veneer.analyse.cost.simulate import Memory
from veneer.cli.frame import main
from veneer.runs.starts import calibration
from veneer.tasks.text import next_token
from veneer.train.run import Run
from veneer.verbs.plan import plan as module
from veneer.verbs.plan import smaller
from veneer.verbs.plan.layers import Layer, kinds
from veneer.verbs.plan.plan import plan
from veneer.verbs.plan.probe import measure
from veneer.verbs.plan.room import NoRoom
from veneer.verbs.plan.smaller import Trial
from veneer.verbs.plan.text import text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


@pytest.fixture
def untried(monkeypatch):
    """No setting is tried for what it would save, which takes most of the time."""
    monkeypatch.setattr(module, "halving", lambda *given: [])


def run(folder, **changed):
    return Run.from_dict(tiny.settings(folder, **changed))


@pytest.fixture(scope="module")
def planned(folder):
    """A plan with its probe, the same for all that only look at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smaller, "MOST", 1)
        return plan(run(folder), progress=False)


def test_a_square_layer_trains_2r_of_d_and_the_sums_are_those_of_the_closed_form():
    model = models.llama()
    attach(model, "lora", to=["q_proj", "gate_proj"], rank=4)
    found = simulate.step(model, SHAPE, causal_lm()).memory
    trained = 2 * 2 * 4 * 32 + 2 * 4 * (32 + 48)  # two layers of 32 x 32, two of 48 x 32
    assert (found.adapter, found.gradients) == (4 * trained, 4 * trained)
    assert found.optimiser == 2 * 4 * trained + 4 * 8  # two moments, and a step for each of 8 tensors
    assert found.weights == sum(p.numel() * 4 for p in base_parameters(model).values()) + n_bytes(
        model.buffers()
    )
    assert found.logits == 2 * SHAPE.labels * models.VOCABULARY * 4


def test_layers_tell_site_shape_rank_and_share(planned):
    by_name = {layer.site: layer for layer in planned.layers}
    q = by_name["model.layers.0.self_attn.q_proj"]
    assert (q.out, q.in_, q.rank, q.trained, q.share) == (32, 32, 4, 256, 2 * 4 / 32)
    assert planned.trained == sum(layer.trained for layer in planned.layers)
    base = models.llama(vocab_size=len(tiny.tokenizer()))
    assert (
        planned.base == sum(p.numel() for p in base.parameters())
        and planned.share == planned.trained / planned.base
    )


def test_layers_of_a_kind_are_one_line(planned):
    lines = text(planned).splitlines()
    assert lines[1].split() == "2 x self_attn.q_proj 32 x 32 4 512 25.00%".split()
    assert len([line for line in lines if " x self_attn." in line or " x mlp." in line]) == 7
    blocks = [
        Layer(f"model.layers.{i}.mlp.experts.{e}.up", 8, 4, 2, 24, 0.75) for i in range(3) for e in (0, 1)
    ]
    others = [
        Layer("model.layers.3.mlp.experts.0.up", 8, 4, 1, 12, 0.375),
        Layer("lm_head", 9, 4, 2, 26, 0.72),
    ]
    found = [(k.n_layers, k.name, k.layer.rank, k.trained) for k in kinds([*blocks, *others])]
    name = "mlp.experts.*.up"
    assert found == [(6, f"{name}", 2, 144), (1, f"{name}", 1, 12), (1, "lm_head", 2, 26)]
    sides = [Layer(f"{side}.block.0.q", 4, 4, 1, 8, 0.5) for side in ("encoder", "decoder")]
    assert [k.name for k in kinds(sides)] == ["encoder.block.*.q", "decoder.block.*.q"]


def test_a_fraction_of_tied_weights_counts_once():
    table = nn.Embedding(10, 4)
    assert n_bytes([table.weight, table.weight, table.weight[:2]]) == 160


def test_live_counts_what_exists_at_once_and_not_what_was_there():
    x = torch.ones(1000)
    with Live() as live:
        a = x + 1
        b = a * 2
        x.add_(1)
        c = b.view(10, 100)
        del a
        assert live.made.now == 4000
        del b
        assert live.made.now == 4000  # a view holds it
        del c
    assert (live.made.now, live.made.peak) == (0, 8000)


def test_saved_counts_a_storage_once_and_no_parameter():
    w = nn.Parameter(torch.ones(100, 100))
    x = torch.ones(50, 100, requires_grad=True)
    saved = Saved([w])
    with saved.watching():
        y = (x @ w).relu()
        z = y * y.exp()
    assert saved.kept.peak == 4 * 50 * 100 * 3  # x, y, exp(y); relu keeps its own output
    z.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_step_by_shapes_keeps_and_takes_what_a_real_one_does(method):
    model = models.llama()
    attach(model, method, rank=4)
    foreseen = simulate.step(model, SHAPE, causal_lm()).memory
    live, saved = real_step(model, model.parameters())
    assert foreseen.activations == pytest.approx(saved.kept.peak, rel=0.02)
    assert foreseen.growth - foreseen.optimiser == pytest.approx(live.made.peak, rel=0.05)
    assert all(p.grad is None for p in model.parameters())


def test_full_fine_tuning_by_shapes_is_that_of_a_real_step():
    model = models.llama()
    foreseen = simulate.step(model, SHAPE, causal_lm(), full=True).memory
    live, saved = real_step(model, model.parameters())
    assert foreseen.activations == pytest.approx(saved.kept.peak, rel=0.02)
    assert foreseen.growth - foreseen.optimiser == pytest.approx(live.made.peak, rel=0.05)
    attach(model, "lora", rank=4)
    with using(model):
        assert simulate.step(model, SHAPE, causal_lm(), full=True).memory._replace(adapter=0) == foreseen


def test_a_foreseen_step_changes_nothing():
    model = models.llama()
    attach(model, "lora", rank=4, dropout=0.1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    simulate.step(model, SHAPE._replace(passes=3, packed=True), causal_lm(), base=torch.bfloat16)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and not model.training


@pytest.mark.parametrize("full", [False, True])
def test_operations_are_those_that_torch_counts_in_a_real_step(full):
    model = models.llama(attn_implementation="eager")  # torch counts no fused attention on a CPU
    if not full:
        attach(model, "lora", rank=4)
    found = simulate.step(model, SHAPE, causal_lm(), full=full).flops
    with FlopCounterMode(display=False) as counter:
        next_token.loss(model.train(), batch(), chunked=False)[0].backward()
    unlearned = 2 * (SHAPE.rows * SHAPE.tokens - SHAPE.labels) * models.VOCABULARY * 32
    assert (
        found.total == counter.get_total_flops() - (3 if full else 2) * unlearned
    )  # logits that nobody learns from are never made


def test_operations_by_part_are_the_closed_forms():
    model = models.llama()
    attach(model, "lora", rank=4)
    found = simulate.step(model, SHAPE, causal_lm()).flops
    n = SHAPE.rows * SHAPE.tokens
    rows = {
        "q": (32, 32),
        "k": (16, 32),
        "v": (16, 32),
        "o": (32, 32),
        "gate": (48, 32),
        "up": (48, 32),
        "down": (32, 48),
    }
    head = 2 * SHAPE.labels * 32 * models.VOCABULARY
    products = 2 * sum(2 * n * a * b for a, b in rows.values())
    first = sum(2 * n * math.prod(rows[k]) for k in "qkv")  # they read the embeddings, which are not trained
    assert (found.forward, found.inputs, found.weights) == (products + head, products - first + head, 0)
    pairs = 2 * sum(2 * n * 4 * (a + b) for a, b in rows.values())
    assert found.adapter == 3 * pairs - sum(2 * n * 4 * 32 for _ in "qkv")
    assert (
        found.attention == 2 * 7 * 2 * SHAPE.rows * 4 * SHAPE.tokens**2 * 8
    )  # 7 products, 2 layers, 4 heads of 8


def test_passes_add_operations_and_no_activations():
    model = models.llama()
    attach(model, "lora", rank=4)
    one, four = (
        simulate.step(model, SHAPE, causal_lm()),
        simulate.step(model, SHAPE._replace(passes=4), causal_lm()),
    )
    assert four.flops.total == 4 * one.flops.total and four.memory.activations == one.memory.activations
    assert 0 < four.memory.peak - one.memory.peak <= one.memory.gradients + 8  # and the sum of the loss


def test_the_probe_measures_and_nothing_is_written(folder, planned, untried):
    found = planned.measured
    assert (
        found is not None
        and found.seconds > 0
        and found.processor_seconds > 0
        and found.evaluation_seconds > 0
    )
    estimate = plan(run(folder), probe=False, progress=False)
    assert estimate.measured is None and estimate.seconds is None
    assert planned.memory.activations == pytest.approx(estimate.memory.activations, rel=0.1)
    assert planned.memory.growth == pytest.approx(estimate.memory.growth, rel=0.1)
    assert not (folder / "run").exists()
    if found.growth is not None:
        assert planned.growth == found.growth


def test_length_counts_steps_tokens_and_evaluations(planned):
    assert planned.length.steps == 14
    assert planned.length.evaluations == 5  # before steps 0, 4, 8 and 12, and after 14
    # Valid and known text are short: all 6 windows of each are measured, in batches of 2.
    assert planned.length.batches == 5 * 2 * 3
    assert planned.length.tokens == pytest.approx(14 * 2 * 2 * 32, rel=0.02)
    expected = 14 * planned.measured.seconds + 30 * planned.measured.evaluation_seconds
    assert planned.seconds == pytest.approx(expected)


def test_the_setting_that_halves_is_tried(planned):
    tried = {t.setting: t for t in planned.halving}
    assert {"gradient_checkpointing", "batch", "precision", "length"} == set(tried)  # rank 4 takes too little
    assert tried["gradient_checkpointing"].share < 0.97 and not planned.run.gradient_checkpointing
    assert [t.halves for t in planned.halving] == sorted((t.halves for t in planned.halving), reverse=True)
    assert all(0 < t.share < 1 for t in planned.halving)
    assert tried["length"].change == "--length 16"
    assert tried["batch"].change.startswith("--batch 1 --accumulate 4")
    assert tried["batch"].share > 0.5  # so half of an even batch is not tried where a quarter can be


def test_a_start_that_looks_at_the_loss_is_planned_by_its_shapes(folder, monkeypatch):
    monkeypatch.setattr(calibration, "look", lambda *given: pytest.fail("a pass over the text was made"))
    for other in ("_recompute", "_batch", "_precision", "_length"):
        monkeypatch.setattr(smaller, other, lambda *given: iter(()))
    loraga = run(folder, options={"rank": 16, "init": "loraga"}, batch=1, accumulate=1, length=8)
    found = plan(loraga, probe=False, progress=False)
    assert {layer.rank for layer in found.layers} == {16, 32}  # twice the rank, or all of a smaller layer
    assert found.halving[0].change.startswith("--rank ") and found.halving[0].share < 1


def test_full_fine_tuning_is_planned_alone(folder, untried):
    found = plan(run(folder, method="full", options={}), probe=False, progress=False)
    assert found.memory == found.full and found.share == 1
    assert "no setting can be halved any more" in text(found)
    assert "full fine-tuning: estimated" not in text(found) and "full: estimated from shapes" in text(found)


def test_the_text_has_units_and_both_columns(planned):
    shown = text(planned)
    for words in (
        "full fine-tuning",
        "kept for the backward",
        "10^9 operations a step",
        "tokens/s",
        "one setting:",
        "available on cpu: ",
    ):
        assert words in shown
    assert "lora: measured; full fine-tuning: estimated from shapes" in shown
    assert json.loads(json.dumps(planned.as_dict()))["layers"][0]["in"] == 32


def test_what_does_not_fit_is_said_and_exits_3(folder, untried, monkeypatch, capsys):
    config = folder / "run.yaml"
    config.write_text(json.dumps(tiny.settings(folder)))
    monkeypatch.setattr(
        process_memory, "available", lambda device: 500_000
    )  # the model has 200 kB, a step takes more
    assert main(["plan", "--config", str(config)]) == 3
    out, _ = capsys.readouterr()
    assert (
        "will not fit: a step takes about" in out
        and "500 kB are available on cpu; see which setting would halve it" in out
    )
    assert "seconds: not measured" in out  # no probe is dared
    monkeypatch.setattr(process_memory, "available", lambda device: 1000)
    assert main(["plan", "--config", str(config)]) == 3
    err = capsys.readouterr().err
    assert (
        "in 32 bits, and 1 kB of memory are available on cpu; free memory, use a smaller model, or"
        " --precision bf16" in err
    )


def test_the_verb_takes_the_settings_of_fit(folder, untried, capsys):
    config = folder / "run.yaml"
    config.write_text(json.dumps(tiny.settings(folder)))
    assert (
        main(["plan", "--config", str(config), "--no-probe", "--rank", "2", "--to", "q_proj", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [(n["rank"], n["trained"]) for n in found["layers"]] == [(2, 128), (2, 128)]
    assert found["memory_is"] == "estimated from shapes" and found["fits"] and found["probe"] is None


def test_memory_of_the_machine(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:      8 kB\n")
    monkeypatch.setattr(process_memory, "MEMINFO", meminfo)
    monkeypatch.setattr(process_memory, "GROUP", tmp_path)
    cpu = torch.device("cpu")
    assert process_memory.available(cpu) == 8192
    for name, content in {
        "memory.max": "5000",
        "memory.current": "3000",
        "memory.stat": "anon 7\ninactive_file 100\n",
    }.items():
        (tmp_path / name).write_text(content)
    assert process_memory.available(cpu) == 2100  # what a container has left, its file cache included
    (tmp_path / "memory.max").write_text("max")
    assert process_memory.available(cpu) == 8192


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux tells what a process held at most"
)
def test_the_peak_of_the_process_is_seen():
    cpu = torch.device("cpu")
    before = process_memory.forget_peak(cpu)
    torch.ones(25_000_000).sum()
    most = process_memory.peak(cpu)
    assert before is not None and most is not None and 90e6 < most - before < 130e6


def test_a_trial_halves_at_one_half():
    assert Trial("batch", "batch 1", 0.5).halves and not Trial("batch", "batch 1", 0.51).halves


def test_growth_is_over_model_and_adapter():
    assert Memory(100, 10, 10, 20, 30, 5, 170).growth == 60
    assert (
        issubclass(NoRoom, Exception)
        and NoRoom.exit_code == 3
        and module.plan is plan
        and measure is not None
    )
