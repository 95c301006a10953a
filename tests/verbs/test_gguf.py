"""GGUF: adapters and whole models, read back by transformers and compared; Ollama's Modelfile."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from support import tiny
from support.models import llama, randomise

import veneer
from veneer.cli.frame import main
from veneer.convert import gguf_layout
from veneer.convert.base import Base
from veneer.convert.dialects import gguf as dialect
from veneer.data.chat import templates
from veneer.errors import ConfigError, FormatError
from veneer.verbs.gguf import modelfile, vocabulary

pytest.importorskip("gguf")
IDS = torch.arange(3, 35).view(2, 16)
TEXTS = ["The cat sat on a mat. 1234 moons, don't!", "x = [1, 2]\n\tüber äöü 日本 \U0001f600"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base with grouped queries, and a LoRA adapter of random weights."""
    folder = tmp_path_factory.mktemp("gguf")
    model = llama(vocab_size=len(tiny.tokenizer()) + 3, num_key_value_heads=2)
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    veneer.attach(model, "lora", to=["q_proj", "k_proj", "v_proj", "down_proj"], rank=3, alpha=5, name="a")
    randomise(model, "a", size=0.3)
    veneer.save(model, folder / "a", "a")
    return folder


def reference(place: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32).eval()
    veneer.load(model, place / "a", "a")
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(("dtype", "off"), [("fp32", 2e-5), ("fp16", 5e-3), ("bf16", 4e-2)])
def test_a_merged_model_reloads_to_the_same_outputs_and_tokens(place, tmp_path, capsys, dtype, off):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, wanted = tmp_path / "out", reference(place)
    words = ["export", str(place / "base"), "--adapter", str(place / "a"), "--out", str(out)]
    assert main([*words, "--format", "gguf", "--dtype", dtype]) == 0, capsys.readouterr().err
    assert "reloaded: outputs differ by" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"model.gguf", "Modelfile", "export.json"}
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(IDS).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < off
    assert float((reference(place) - wanted).abs().max()) == 0
    read, own = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf"), tiny.tokenizer()
    for text in TEXTS:
        assert read(text, add_special_tokens=False)["input_ids"] == own(text)["input_ids"]
    assert (read.bos_token_id, read.eos_token_id) == (own.bos_token_id, own.eos_token_id)


def test_an_adapter_is_what_llama_cpp_would_add(place, tmp_path, capsys):
    """B A from the file, with the rows of queries and keys put back, is the change of the merged weight."""
    out, base = tmp_path / "out", llama(vocab_size=len(tiny.tokenizer()) + 3, num_key_value_heads=2)
    words = ["convert", str(place / "a"), "--to", "gguf", "--out", str(out), "--model", str(place / "base")]
    assert main(words) == 0, capsys.readouterr().err
    tensors = dialect.read(out / "adapter.gguf")
    assert len(tensors) == 2 * 4 * 2 and "blk.1.attn_k.weight.lora_b" in tensors
    veneer.load(base, place / "a", "a")
    before = {n: p.detach().clone() for n, p in base.named_parameters() if "own" not in n}
    veneer.merge(base, "a")
    for site, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", 0)):
        name = f"model.layers.1.self_attn.{site}.weight"
        change = tensors[f"blk.1.{theirs}.weight.lora_b"] @ tensors[f"blk.1.{theirs}.weight.lora_a"]
        if heads:  # neighbours are the two halves of a head
            change = change.view(heads, -1, 2, change.shape[1]).transpose(1, 2).reshape(change.shape)
        change_here = base.state_dict()[name] - before[name]
        torch.testing.assert_close(change, change_here, rtol=0, atol=1e-5)
        assert change.abs().max() > 1e-3


def test_fields_of_an_adapter(place, tmp_path):
    import gguf

    out = tmp_path / "out"
    veneer_words = ["convert", str(place / "a"), "--to", "gguf", "--out", str(out)]
    assert main([*veneer_words, "--model", str(place / "base")]) == 0
    reader = gguf.GGUFReader(out / "adapter.gguf")
    fields = {
        n: reader.get_field(n).contents() for n in ("general.type", "general.architecture", "adapter.type")
    }
    assert list(fields.values()) == ["adapter", "llama", "lora"]
    assert reader.get_field("adapter.lora.alpha").contents() == 0.0  # the scaling is in lora_b


def test_a_file_that_differs_is_refused(place, tmp_path):
    out = tmp_path / "out"
    words = ["convert", str(place / "a"), "--to", "gguf", "--out", str(out), "--model", str(place / "base")]
    assert main(words) == 0
    tensors = dialect.read(out / "adapter.gguf")
    dialect.check(out / "adapter.gguf", tensors)
    name = next(iter(tensors))
    with pytest.raises(FormatError, match="read back, these tensors differ"):
        dialect.check(out / "adapter.gguf", {**tensors, name: tensors[name] + 1})


def test_unsuitable_models_are_refused():
    with pytest.raises(
        ConfigError, match="GGUF is written for models of type llama, mistral, qwen2, qwen3, got"
    ):
        gguf_layout.architecture("mamba")
    with pytest.raises(FormatError, match=r"GGUF has no tensor for model\.adapter; leave these layers out"):
        gguf_layout.names(["model.adapter"], "llama", 2)
    with pytest.raises(ConfigError, match="GGUF: the tokenizer splits texts by Metaspace, which has no name"):
        vocabulary.before({"type": "Metaspace"})
    rows = torch.arange(8.0).view(8, 1)
    kept = gguf_layout.permuted("layers.0.q_proj", rows, Base(heads=2, kind="qwen2"))
    moved = gguf_layout.permuted("layers.0.q_proj", rows, Base(heads=2, kind="llama"))
    assert torch.equal(kept, rows) and moved.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("name", ["plain", "chatml", "llama3", "gemma", "mistral"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_modelfiles_template_asks_as_the_chat_template_does(name, system):
    """Filled in by hand, Ollama's template is what apply_chat_template writes after the beginning token."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    templates.choose(tokenizer, name)
    written = modelfile.template(tokenizer)
    if system and ".System" not in written:
        pytest.skip("the template takes no system message")
    has, otherwise = re.fullmatch(r"(?s){{ if .System }}(.*){{ else }}(.*){{ end }}.*", written).groups()
    tail = written.split("{{ end }}")[1]
    filled = ((has if system else otherwise) + tail).replace("{{ .System }}", system or "")
    messages = [{"role": "system", "content": system}] if system else []
    wanted = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": "Hi?"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.bos_token + filled.replace("{{ .Prompt }}", "Hi?") in (
        wanted,
        tokenizer.bos_token + wanted,
    )
