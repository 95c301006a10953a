"""Weights that PEFT trains beside its targets: biases, rows of tokens, embeddings of a resized vocabulary."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as T
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import SIZES, randomise

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.peft import beside
from veneer.errors import FormatError, NotMergeable

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def qwen(**config):
    torch.manual_seed(0)
    model = T.Qwen2ForCausalLM(T.Qwen2Config(**SIZES, **config)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.normal_(std=0.3)
    return model


def llama(**config):
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(**{**SIZES, **config})).eval()


def by_peft(base, folder, **options):
    """PEFT's adapter with random numbers, saved in `folder`."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(base, config)
    torch.manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.3)
    model.save_pretrained(folder)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_same(build, model, folder, ids=IDS):
    """Ours gives PEFT's logits: loaded, merged, saved again, and opened by PEFT from the saved folder."""
    ours = veneer.load(build(), folder)
    torch.testing.assert_close(logits(ours, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    again = folder.parent / f"{folder.name}-again"
    veneer.save(ours, again)
    torch.testing.assert_close(
        logits(veneer.load(build(), again), ids), logits(model, ids), rtol=1e-4, atol=1e-5
    )
    veneer.merge(ours)
    torch.testing.assert_close(logits(ours, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    return again


BIASES = {
    "all": {"target_modules": ["q_proj"], "bias": "all"},
    "lora_only": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "of the branch": {"target_modules": ["q_proj"], "lora_bias": True},
    "of the branch, rank-stabilised": {"target_modules": ["k_proj"], "lora_bias": True, "use_rslora": True},
}


@pytest.mark.parametrize("kind", BIASES)
def test_biases_act_as_in_peft(kind, tmp_path):
    model = by_peft(qwen(), tmp_path / "a", **BIASES[kind])
    again = assert_same(qwen, model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(qwen(), again).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BIASES)
def test_a_strength_dials_biases_too(kind, tmp_path):
    by_peft(qwen(), tmp_path / "a", **BIASES[kind])
    model = veneer.load(qwen(), tmp_path / "a")
    with veneer.using(model, {"default": 0.5}):
        half = logits(model)
    merged = copy.deepcopy(model)
    veneer.merge(merged, {"default": 0.5})
    torch.testing.assert_close(logits(merged), half, rtol=1e-4, atol=1e-5)
    with veneer.using(model):
        assert torch.equal(logits(model), logits(qwen()))


def test_a_bias_that_the_layer_lacks_cannot_be_merged(tmp_path):
    model = by_peft(llama(), tmp_path / "a", target_modules=["q_proj"], lora_bias=True)
    ours = veneer.load(llama(), tmp_path / "a")
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(NotMergeable, match=r"layers\.0\.self_attn\.q_proj, .* have no bias"):
        veneer.merge(ours)
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())


def test_biases_do_not_get_lost_on_other_ways(tmp_path):
    by_peft(qwen(), tmp_path / "a", **BIASES["of the branch"])
    model = veneer.load(qwen(), tmp_path / "a", "a")
    with pytest.raises(NotMergeable, match="changes the bias of"):
        veneer.to_lora(model, "a", "plain", rank=4)
    with pytest.raises(veneer.errors.ConfigError, match="has no normal form"):
        veneer.bank(model, ["a"])


def test_a_missing_bias_of_the_branch_is_named(tmp_path):
    by_peft(qwen(), tmp_path / "a", **BIASES["of the branch"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file(
        {k: t for k, t in load_file(path).items() if not k.endswith("lora_B.bias")}, path, {"format": "pt"}
    )
    with pytest.raises(FormatError, match=r"- missing: model\.layers\.0\.self_attn\.q_proj\.lora_B\.bias"):
        veneer.load(qwen(), tmp_path / "a")


ROWS = {
    "a list": {"trainable_token_indices": [5, 6, 95]},
    "by name": {"trainable_token_indices": {"embed_tokens": [5, 7]}},
    "of the head": {"trainable_token_indices": {"lm_head": [5, 9]}},
    "of both ends": {"trainable_token_indices": {"embed_tokens": [5, 7], "lm_head": [5, 9]}},
    "beside the embedding": {
        "trainable_token_indices": {"lm_head": [5, 9]},
        "target_modules": ["q_proj", "embed_tokens"],
    },
}


# PEFT ties the ends of a tied model, whose rows then differ in the settings alone.
ENDS = [(kind, tied) for kind in ROWS for tied in (False, True) if (kind, tied) != ("of both ends", True)]


@pytest.mark.parametrize(("kind", "tied"), ENDS)
def test_rows_of_tokens_act_as_in_peft(kind, tied, tmp_path):
    def build():
        return llama(tie_word_embeddings=tied)

    ids = torch.tensor([[5, 6, 7, 9, 95, 3, 5]])
    model = by_peft(build(), tmp_path / "a", **{"target_modules": ["q_proj"], **ROWS[kind]})
    assert_same(build, model, tmp_path / "a", ids)


@pytest.mark.parametrize(("method", "start"), [("lora", "olora"), ("dora", True)])
def test_rows_beside_a_change_that_cannot_hold_them_are_refused(method, start, tmp_path):
    """Only a LoRA from zero takes them up as further ranks."""
    folder = tmp_path / "a"
    model = veneer.attach(llama(), method, rank=2, to=["lm_head"])
    randomise(model)
    rows = {f"base_model.model.lm_head.{beside.ROWS}": torch.ones(1, 32)}
    veneer.save(model, folder)
    (folder / "veneer.json").unlink()
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({**load_file(path), **rows}, path, {"format": "pt"})
    told = {"init_lora_weights": start, "trainable_token_indices": {"lm_head": [5]}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **told}))
    with pytest.raises(FormatError, match="lm_head: rows of tokens were trained beside another change"):
        veneer.load(llama(), folder)


def test_rows_beyond_the_vocabulary_say_what_to_do(tmp_path):
    big = llama(vocab_size=98)
    by_peft(big, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[97])
    with pytest.raises(FormatError, match=r"resize its vocabulary first \(model\.resize_token_embeddings\)"):
        veneer.load(llama(), tmp_path / "a")


def resized(seed, size=98, **config):
    model = llama(**config)
    torch.manual_seed(seed)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_opened_on_a_base_of_the_same_size(tied, tmp_path):
    config = {"tie_word_embeddings": tied}
    model = get_peft_model(
        resized(1, **config), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    ids = torch.tensor([[5, 97, 96, 7]])
    y = logits(model.eval(), ids)
    ours = veneer.load(resized(2, **config), tmp_path / "a")
    torch.testing.assert_close(logits(ours, ids), y, rtol=1e-4, atol=1e-5)
    veneer.merge(ours)
    torch.testing.assert_close(logits(ours, ids), y, rtol=1e-4, atol=1e-4)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


def test_a_base_of_another_size_is_refused_with_the_size(tmp_path):
    model = get_peft_model(resized(1), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(
        FormatError, match=r"resize the vocabulary first: model\.resize_token_embeddings\(98\)"
    ):
        veneer.load(llama(), tmp_path / "a")


@pytest.mark.parametrize(
    ("shape", "said"), [((48, 32), ""), ((48, 33), r" \(\(48, 33\) in .* \(48, 32\) here\)")]
)
def test_weights_of_another_base_in_the_file_are_named(shape, said, tmp_path):
    """Only other numbers of rows are those of another vocabulary."""
    by_peft(llama(), tmp_path / "a", target_modules=["q_proj"])
    path, name = tmp_path / "a" / "adapter_model.safetensors", "model.layers.0.mlp.up_proj.weight"
    save_file({**load_file(path), f"base_model.model.{name}": torch.ones(shape)}, path, {"format": "pt"})
    with pytest.raises(
        FormatError, match=rf"{name} in the file is another than .*base's{said}: the base is an"
    ):
        veneer.load(llama(), tmp_path / "a")


def test_equal_embeddings_in_the_file_change_nothing(tmp_path):
    model = get_peft_model(resized(1), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    ours = veneer.load(resized(1), tmp_path / "a")
    assert all(site.kind == "linear" for site, _ in changes(ours, "default"))


def trained(model, *beside, **options):
    """Attaches a LoRA and moves it and the named weights of the base, as steps of an optimiser do."""
    veneer.attach(model, "lora", rank=2, **{"to": ["q_proj"], **options})
    torch.manual_seed(7)
    for n, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or n in beside)
        if p.requires_grad:
            with torch.no_grad():
                p.add_(torch.randn_like(p) * 0.3)
    return model


def record(folder):
    return json.loads((folder / "veneer.json").read_text())


def test_a_norm_trained_beside_the_adapter_is_saved_with_it(tmp_path):
    model = trained(llama(), "model.norm.weight")
    veneer.save(model, tmp_path / "a")
    saved = record(tmp_path / "a")
    assert saved["base"]["replaced"] == ["model.norm"] and "model.norm.weight" not in saved["base"]["tensors"]
    assert saved["probe"]["compared"] == ["on"] and "model.norm" not in saved["sites"]
    torch.testing.assert_close(logits(veneer.load(llama(), tmp_path / "a")), logits(model))
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    edited = llama()
    edited.model.layers[0].mlp.up_proj.weight.data.add_(0.1)
    with pytest.raises(FormatError, match=r"another base: 1 of \d+ weights have other values"):
        veneer.load(edited, tmp_path / "a")


def test_weights_that_cannot_be_saved_beside_the_adapter_are_named(tmp_path):
    lost = r"would be lost: model\.layers\.1\.self_attn\.q_proj; attach them with method 'full'"
    model = trained(qwen(), "model.layers.1.self_attn.q_proj.bias")
    with pytest.raises(FormatError, match=lost):
        veneer.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    model = llama()
    veneer.attach(model, "bottleneck", rank=2)
    model.model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    with pytest.raises(FormatError, match=r"would be lost: model\.norm; "):  # no format of PEFT's
        veneer.save(model, tmp_path / "a")


def test_a_random_head_is_saved_with_the_adapter(tmp_path):
    def build(seed):
        torch.manual_seed(0)
        config = T.LlamaConfig(**SIZES, num_labels=3, pad_token_id=0)
        model = T.LlamaForSequenceClassification(config).eval()
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.score.weight)
        return model

    model = trained(build(1))
    veneer.save(model, tmp_path / "a")
    assert record(tmp_path / "a")["base"]["replaced"] == ["score"]
    torch.testing.assert_close(logits(veneer.load(build(2), tmp_path / "a")), logits(model))


def test_a_second_adapter_is_read_beside_a_first_on_the_same_modules(tmp_path):
    """The first one's tensors inside these modules are not the model's own."""
    kept = {"modules_to_save": ["lm_head", "norm"], "bias": "all", "trainable_token_indices": [5, 6]}
    model = by_peft(qwen(), tmp_path / "a", target_modules=["q_proj"], **kept)
    ours = veneer.load(qwen(), tmp_path / "a", "one")
    veneer.load(ours, tmp_path / "a", "two")
    for name in ("one", "two"):
        with veneer.using(ours, {name: 1.0}):
            torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    veneer.save(ours, tmp_path / "b", "two")
    again = veneer.load(qwen(), tmp_path / "b")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
