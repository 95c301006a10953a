"""A base that stays on disk trains the adapter that one in memory does, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import families, models, tiny

import veneer
from veneer.analyse.cost import process_memory
from veneer.cli.frame import main
from veneer.errors import ConfigError, FormatError
from veneer.models import pretrained
from veneer.models.from_disk import from_disk
from veneer.models.on_disk import shelf_of
from veneer.runs import fit as training
from veneer.sites.blocks import blocks
from veneer.train.run import Run
from veneer.train.speed import compiling

CPU = torch.device("cpu")
BLOCK = 9  # parameters of a Llama's block


def trained(folder: Path, name: str, **changed: Any) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Returns the metrics of a run and the files of its adapter."""
    given = tiny.settings(folder, steps=5, **changed)
    training.fit(Run.from_dict({**given, "out": str(folder / name)}), progress=False)
    files = ("adapter_model.safetensors", "veneer.json")
    return tiny.metrics(folder / name), [(folder / name / "adapter" / f).read_bytes() for f in files]


@pytest.mark.parametrize(
    "changed",
    [
        {},  # dropout is on
        {"precision": "bf16", "method": "dora"},
        {"quantise": "nf4", "precision": "bf16"},
        {"quantise": "int8", "method": "dora"},
        {"options": {"rank": 2, "init": "pissa"}},
        {"method": "hira", "options": {}},
        {"task": "causal-lm", "neftune": 5.0, "gradient_checkpointing": True, "optimiser": "lorapro"},
    ],
)
def test_losses_and_adapter_are_those_of_a_base_in_memory(changed, tmp_path):
    assert trained(tmp_path, "memory", **changed) == trained(tmp_path, "disk", stream_base=True, **changed)


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_transposed_layers_under_shorter_names(quantise, tmp_path):
    tiny.settings(tmp_path)  # writes the texts
    model = models.gpt2(vocab_size=len(tiny.tokenizer()), tie_word_embeddings=True)
    for part in (model.transformer, tiny.tokenizer()):  # its files name h.0, the model transformer.h.0
        part.save_pretrained(tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(
        json.dumps({**config, "architectures": ["GPT2LMHeadModel"]})
    )
    own = {"model": str(tmp_path / "gpt2"), "quantise": quantise}
    assert trained(tmp_path, "memory", **own) == trained(tmp_path, "disk", stream_base=True, **own)


def test_a_run_may_go_on_with_its_base_on_disk(tmp_path):
    whole = trained(tmp_path, "whole")
    begun = Run.from_dict({**tiny.settings(tmp_path, steps=5), "out": str(tmp_path / "both")})
    training.fit_until(begun, 3)
    assert whole == trained(tmp_path, "both", stream_base=True, resume=True)


@pytest.fixture
def base(tmp_path):
    return tiny.base(tmp_path / "base", num_hidden_layers=4)


def test_one_block_is_in_memory_forward_and_backward(base):
    model: Any = veneer.attach(from_disk(str(base), torch.float32, CPU), "lora", rank=2)
    shelf = shelf_of(model)
    assert shelf is not None and all(
        p.is_meta for p in model.model.layers[3].mlp.up_proj._parameters.values() if p is not None
    )
    assert shelf.bytes == 4 * shelf.block_bytes
    compiling.recompute(model, True)
    ids, reads = torch.arange(24)[None], shelf.reads
    for _ in range(2):
        model.train()(ids, labels=ids).loss.backward()
    assert shelf.made == BLOCK  # one buffer for each parameter of a block
    # Forward and backward turn at a block that is still there: 4 + 3 blocks, then 3 + 3.
    assert shelf.reads - reads == 13


def test_numbers_that_someone_holds_are_not_overwritten(base):
    """Without recomputation the backward needs every block's own numbers: more memory, the same gradient."""
    whole: Any = pretrained.causal_lm(str(base), torch.float32, CPU)
    model: Any = from_disk(str(base), torch.float32, CPU)
    first = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight  # noqa: B018 (reads the next block)
    assert torch.equal(first, whole.model.layers[0].mlp.up_proj.weight)
    found = []
    for some in (whole, model):
        veneer.attach(some, "lora", rank=2)
        ids = torch.arange(24)[None]
        some.train()(ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in some.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 50
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items())


@pytest.mark.parametrize("name", ["qwen3", "gemma", "phi3", "falcon", "gpt-oss", "llama4", "mamba2"])
def test_other_families_have_the_gradients_of_a_base_in_memory(name, tmp_path):
    families.build(name).save_pretrained(tmp_path)
    ids, found = torch.arange(24)[None], []
    for opened in (pretrained.causal_lm, from_disk):
        model: Any = veneer.attach(opened(str(tmp_path), torch.float32, CPU), "lora", rank=2)
        compiling.recompute(model, opened is from_disk)
        loss = model.train()(ids, labels=ids, use_cache=False).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **grads})
    shelf = shelf_of(model)
    assert shelf is not None and shelf.made == len(list(model_blocks(model)[0].named_parameters()))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 8
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())


def model_blocks(model: Any) -> list[Any]:
    veneer.detach(model)
    return blocks(model)


def test_experts_that_are_fused_while_loading_are_refused(tmp_path):
    families.build("mixtral").save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"as MixtralForCausalLM names them; .*mlp\.experts\.gate_up_proj"):
        from_disk(str(tmp_path), torch.float32, CPU)


def test_what_cannot_go_with_it_is_refused():
    given = dict(shard=True, samples=2, compile="on", cache_frozen=True)
    with pytest.raises(ConfigError) as found:
        Run(data="-", stream_base=True, valid="-", **given)  # type: ignore[arg-type]
    for name, why in {
        "shard": "divides a base that is in memory",
        "samples": "reads the whole base for every token",
        "compile": "compiles blocks that are in memory",
        "cache_frozen": "runs the blocks of a base that is in memory",
    }.items():
        assert f"{name} {why}; leave one of them out" in str(found.value).replace("--", "").replace("-", "_")
    with pytest.raises(ConfigError, match="reads a frozen base, and method 'full' trains it"):
        Run(data="-", stream_base=True, method="full")
    with pytest.raises(ConfigError, match="starts from weights alone, and init eva needs more"):
        Run(data="-", stream_base=True, options={"init": "eva"})


def test_bases_that_cannot_be_read_by_blocks(base, tmp_path):
    with pytest.raises(ConfigError, match="got model 'builtin-not-there'; download it"):
        from_disk("builtin-not-there", torch.float32, CPU)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-64])
    with pytest.raises(FormatError, match=r"model.safetensors is damaged .*; download it again"):
        from_disk(str(base), torch.float32, CPU)
    weights.write_bytes(whole.replace(b"layers.2.mlp.up_proj", b"layers.2.mlp.op_proj"))
    with pytest.raises(FormatError, match=r"1 are missing or of another shape: model.layers.2.mlp.up_proj"):
        from_disk(str(base), torch.float32, CPU)
    weights.write_bytes(whole)
    model: Any = from_disk(str(base), torch.float32, CPU)
    weights.write_bytes(whole[:-4096])  # the same file, cut while it is read
    with pytest.raises(FormatError, match=r"ends .* bytes early"):
        [block.mlp.up_proj.weight for block in model.model.layers]


def test_plan_chooses_it_for_a_base_that_does_not_fit(tmp_path, monkeypatch, capsys):
    given = tiny.settings(tmp_path, options={"rank": 1}, batch=1)
    given["model"] = str(tiny.base(tmp_path / "deep", num_hidden_layers=8))
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(given))
    monkeypatch.setattr(process_memory, "available", lambda device: 300_000)
    assert main(["plan", "--config", str(config), "--no-probe", "--json"]) in (0, 3)
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert "planned with --stream-base, which holds" in shown.err and found["stream_base"]
    assert found["memory_bytes"]["lora"]["weights"] < 150_000
    monkeypatch.setattr(process_memory, "available", lambda device: 3_000_000)
    assert main(["plan", "--config", str(config), "--no-probe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["stream_base"] and found["memory_bytes"]["lora"]["weights"] > 300_000


def test_measured_and_written_texts_are_those_of_a_base_in_memory(tmp_path, monkeypatch):
    from veneer.verbs.eval.evaluate import evaluate
    from veneer.verbs.generate import generate

    monkeypatch.chdir(tmp_path)  # packed blocks lie here
    for quantise in (None, "nf4"):
        given = tiny.settings(tmp_path, steps=8, lr=3e-2, quantise=quantise)
        out = str(tmp_path / f"run-{quantise}")
        training.fit(Run.from_dict({**given, "out": out}), progress=False)
        found = []
        for stream in (False, True):
            options: dict[str, Any] = {"adapter": [out], "stream_base": stream, "device": "cpu"}
            own = evaluate(given["model"], data=[given["data"]], length=32, **options, progress=False)
            written = generate("a b c", model=given["model"], tokens=24, dtype="fp32", **options)
            found.append((own.lines, written))
        assert found[0] == found[1] and len(found[0][1]) == 2
        assert found[0][1]["base"] != found[0][1][f"run-{quantise}"]


def test_other_tasks_are_measured_on_a_base_in_memory(tmp_path):
    from veneer.models.of_task import loaded_base
    from veneer.tasks import get

    with pytest.raises(ConfigError, match="reads causal language models block by block; leave it out for"):
        loaded_base("builtin", get("masked-lm"), torch.float32, CPU, stream=True)
