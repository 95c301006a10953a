"""Complaints about formats, resuming, memory and platforms (docs/complaints.md), each test named after the
thread it answers."""

from __future__ import annotations

import ast
import gc
import json
import os
import re
import weakref
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import models, tiny
from support.resuming import Killed, killed_at
from torch import Tensor, nn

import veneer
from veneer.adapt import combine
from veneer.adapt.attached import changes
from veneer.analyse.cost.memory import Live
from veneer.convert import read, write
from veneer.convert.base import of_model
from veneer.convert.pairs import Pair, Pairs, take_part
from veneer.errors import ConfigError, FormatError
from veneer.runs.fit import fit
from veneer.train.run import Run
from veneer.verbs.convert import convert
from veneer.verbs.inspect import inspect

ROOT = Path(__file__).parents[2]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CLOSE = dict(rtol=0, atol=2e-5)


def saved(folder: Path, **options) -> Tensor:
    """A random adapter of ours, and the outputs with it."""
    model = veneer.attach(models.llama(), "lora", **{"to": ["q_proj", "v_proj"], "rank": 2, **options})
    models.randomise(model)
    veneer.save(model, folder)
    return models.output(model)


def edit(folder: Path, **changed) -> None:
    content = {**json.loads((folder / CONFIG).read_text()), **changed}
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def test_litgpt_1990_litgpts_adapter_opens_in_peft(tmp_path):
    wanted = saved(tmp_path / "a")
    base = of_model(models.llama())
    write(read(tmp_path / "a"), tmp_path / "lit", "litgpt", base=base)
    assert (tmp_path / "lit" / "lit_model.pth.lora").is_file()
    write(read(tmp_path / "lit", base=base), tmp_path / "peft", "peft")
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "peft")
    torch.testing.assert_close(models.output(theirs), wanted, **CLOSE)


def test_mlx_lm_1119_mlx_gets_the_settings_that_it_reads_and_peft_gets_its_own_back(tmp_path):
    wanted = saved(tmp_path / "a")
    write(read(tmp_path / "a"), tmp_path / "mlx", "mlx", base=of_model(models.llama()))
    config = json.loads((tmp_path / "mlx" / CONFIG).read_text())
    assert config["num_layers"] == 2 and set(config["lora_parameters"]) >= {
        "rank",
        "scale",
        "dropout",
        "keys",
    }
    with pytest.raises(FormatError, match=r"this adapter_config\.json is mlx-lm's"):
        veneer.load(models.llama(), tmp_path / "mlx")
    write(read(tmp_path / "mlx"), tmp_path / "peft", "peft")
    torch.testing.assert_close(models.output(veneer.load(models.llama(), tmp_path / "peft")), wanted, **CLOSE)


@pytest.mark.parametrize("given", [None, ...], ids=["null", "missing"])
def test_torchtune_2025_a_file_that_names_no_base_can_be_read(tmp_path, given):
    wanted = saved(tmp_path / "a")
    (tmp_path / "a" / "veneer.json").unlink()
    edit(tmp_path / "a", base_model_name_or_path=given)
    torch.testing.assert_close(models.output(veneer.load(models.llama(), tmp_path / "a")), wanted, **CLOSE)
    with pytest.raises(ConfigError, match="does not say which model it was made for; give --model"):
        inspect(str(tmp_path / "a"))


def test_llama_cpp_11554_only_pairs_of_factors_are_exported(tmp_path):
    theirs = peft.get_peft_model(
        models.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1) if p.requires_grad else None
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match=r"lm_head"):
        convert(str(tmp_path / "a"), to="vllm", out=str(tmp_path / "b"))
    done = convert(
        str(tmp_path / "a"), to="vllm", out=str(tmp_path / "b"), allow=["*lm_head*", "modules_to_save"]
    )
    assert any("lm_head" in name for name in done.left_out)
    assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in load_file(tmp_path / "b" / TENSORS))


class Block(nn.Module):
    """Layers whose own names contain the marks that formats use."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_gate = nn.Linear(8, 8)
        self.lora_up = nn.Linear(8, 8)
        self.explora = nn.ModuleDict({"lora_A": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.explora["lora_A"](self.lora_up(self.lora_gate(x)))
        return y


def test_peft_1329_no_layer_is_dropped_for_its_name(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.Sequential(Block(), Block())})
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    pairs = Pairs({n: Pair(torch.randn(2, 8), torch.randn(8, 2), 1.5) for n in names})
    for to in ("kohya", "diffusers", "peft"):
        given = take_part(pairs, "unet") if to == "diffusers" else pairs
        write(given, tmp_path / to, to)
        again = read(tmp_path / to, base=of_model(model))
        assert set(again.sites) == set(given.sites), to
        for name, pair in given.sites.items():
            torch.testing.assert_close(again.sites[name].product(), pair.product())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps without an interruption, and the settings of it."""
    root = tmp_path_factory.mktemp("whole")
    given = tiny.settings(root, steps=8, save_every=2, eval_every=4)
    return given, fit(Run.from_dict({**given, "out": str(root / "whole")}), progress=False)


def test_transformers_35850_the_loss_after_resuming_is_that_of_the_whole_run(whole, tmp_path):
    given, result = whole
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 5)
        with pytest.raises(Killed):
            fit(Run.from_dict({**given, "out": str(tmp_path / "run")}), progress=False)
    fit(Run.from_dict({**given, "out": str(tmp_path / "run"), "resume": True}), progress=False)
    assert tiny.metrics(tmp_path / "run") == tiny.metrics(result.folder)


def test_llamafactory_1373_one_folder_and_one_word_go_on_and_nothing_begins_again_unasked(whole):
    given, result = whole
    out = {"out": str(result.folder)}
    with pytest.raises(ConfigError, match=r"holds another run \(finished\); go on with it by resume=True"):
        fit(Run.from_dict({**given, **out}), progress=False)
    before = result.adapter.stat().st_mtime_ns
    again = fit(Run.from_dict({**given, **out, "resume": True}), progress=False)
    assert again.metrics == result.metrics and result.adapter.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"config: steps: 8 -> 9\n"):
        fit(Run.from_dict({**given, **out, "steps": 9, "resume": True}), progress=False)


def test_axolotl_2633_a_folder_that_cannot_be_written_is_noticed_before_training(
    whole, tmp_path, monkeypatch
):
    given, result = whole
    (tmp_path / "file").write_text("")
    killed_at(monkeypatch, 0)  # any step would end the test
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"file is a file; (name a|choose another) folder"):
            fit(Run.from_dict({**given, "out": str(out)}), progress=False)
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # tests may run as root, who may write everywhere
    with pytest.raises(
        ConfigError, match=r"out .*run: .* is not writable for this user; choose another folder"
    ):
        fit(Run.from_dict({**given, "out": str(tmp_path / "run")}), progress=False)
    assert inspect(str(result.folder)).as_dict()[
        "layers"
    ]  # the run's folder is enough: no checkpoint has to be named


def test_transformers_44660_adapters_that_were_taken_off_are_freed():
    model = models.llama()
    veneer.attach(model, "lora", rank=4)
    gone = [weakref.ref(p) for _, delta in changes(model, "default") for p in delta.parameters()]
    veneer.detach(model)
    gc.collect()
    assert len(gone) == 28 and not any(ref() is not None for ref in gone)


def test_sd_scripts_147_cutting_a_rank_makes_no_dense_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2000, 2000, bias=False))
    veneer.attach(model, "lora", to=["0"], rank=16)
    models.randomise(model)
    with Live() as live:
        (cut,) = combine.to_lora(model, "default", "small", rank=4)
    assert live.made.peak < 4 * 2000 * 2000 / 4
    (before,), (after,) = changes(model, "default"), changes(model, "small")
    D = before[1].delta(before[0]).detach().double()
    S = (
        torch.linalg.svdvals(torch.linalg.qr(before[1].B.detach().double()).R @ before[1].A.detach().double())
        * before[1].scaling
    )
    assert cut.rank == 4 and cut.error == pytest.approx(float(S[4:].norm() / S.norm()), rel=1e-3)
    assert float((after[1].delta(after[0]).detach().double() - D).norm() / D.norm()) == pytest.approx(
        cut.error, rel=1e-3
    )


def test_sd_scripts_147_an_adapter_is_extracted_from_a_fine_tune_with_its_error():
    base, tuned = models.llama(), models.llama()
    veneer.attach(tuned, "lora", to=["q_proj"], rank=3)
    models.randomise(tuned)
    wanted = models.output(tuned)
    veneer.merge(tuned)
    cuts = combine.extract(base, tuned, "back", rank=3)
    assert {c.site for c in cuts} == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)} and all(
        c.error < 1e-5 for c in cuts
    )
    torch.testing.assert_close(models.output(base), wanted, rtol=0, atol=1e-4)


def test_federated_finetuning_3_nothing_asks_for_a_gpus_packages():
    wanted = {"bitsandbytes", "xformers", "flash_attn", "triton", "deepspeed", "apex"}
    kernel = "veneer.ops.fused.kernel"  # needs triton, and is imported by a function where there is a GPU
    imported = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.parse(
            file.read_text(encoding="utf-8")
        ).body:  # what a function imports is needed by those who call it
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            else:
                continue
            assert kernel not in names, file
            if ".".join(file.relative_to(ROOT / "src").with_suffix("").parts) != kernel:
                imported |= {n.partition(".")[0] for n in names}
    assert "torch" in imported and not imported & wanted
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(r"^(?:dependencies|text|cli|plots|data|all) = \[.*\]", project, re.MULTILINE)
    assert len(needed) == 6 and not any(n in line for n in wanted for line in needed)


def test_adapters_392_any_module_can_be_adapted(tmp_path):
    model = models.conv_net()
    before = models.output(model)
    veneer.attach(model, "lora", to=["first", "line", "head"], rank=2)
    models.randomise(model)
    wanted = models.output(model)
    veneer.save(model, tmp_path / "a", probe=models.inputs(model))
    assert float((wanted - before).abs().max()) > 1e-3
    torch.testing.assert_close(models.output(veneer.load(models.conv_net(), tmp_path / "a")), wanted, **CLOSE)


def test_peft_1298_what_is_low_rank_and_what_is_kept_whole_is_told(tmp_path):
    base = tiny.base(tmp_path / "base")
    theirs = peft.get_peft_model(
        models.llama(vocab_size=len(tiny.tokenizer())),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1) if p.requires_grad else None
    theirs.save_pretrained(tmp_path / "a")
    found = inspect(str(tmp_path / "a"), model=str(base))
    ranks = {layer.site: layer.rank for layer in found.layers}
    assert (
        found.method == "lora, full"
        and ranks["model.layers.0.self_attn.q_proj"] == 2
        and ranks["lm_head.weight"] == 32
    )
