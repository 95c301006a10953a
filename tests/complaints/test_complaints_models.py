"""Complaints about models that are not plain language models, and files with more than pairs of factors
(docs/complaints.md). Every kind has its case from a public thread and two siblings."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support import tiny
from support.models import SIZES
from torch import nn

import veneer
from veneer import extract
from veneer.adapt.attached import changes
from veneer.convert import Base, read
from veneer.errors import FormatError, SiteError
from veneer.models import pretrained

TEXT = {**SIZES, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
IDS = torch.randint(12, 90, (1, 16), generator=torch.Generator().manual_seed(1))


def llava(text=TEXT):
    vision = dict(model_type="clip_vision_model", projection_dim=32, **VISION)
    given = dict(text_config={"model_type": "llama", **text}, vision_config=vision, image_token_index=9)
    return T.LlavaForConditionalGeneration(T.LlavaConfig(**given))


def qwen_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=14)
    marks = dict(image_token_id=9, video_token_id=10, vision_start_token_id=7, vision_end_token_id=8)
    given = dict(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **marks)
    return T.Qwen2VLForConditionalGeneration(T.Qwen2VLConfig(**given))


def qwen_audio():
    audio = dict(d_model=32, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48)
    sound = {"num_mel_bins": 16, "max_source_positions": 8, **audio}
    given = dict(text_config={"model_type": "qwen2", **TEXT}, audio_config=sound, audio_token_index=9)
    return T.Qwen2AudioForConditionalGeneration(T.Qwen2AudioConfig(**given))


def gemma3():
    layers = ["sliding_attention", "full_attention"]
    marks = dict(image_token_index=9, boi_token_index=7, eoi_token_index=8, mm_tokens_per_image=4)
    given = dict(text_config={**TEXT, "layer_types": layers}, vision_config=VISION, **marks)
    return T.Gemma3ForConditionalGeneration(T.Gemma3Config(**given))


WRAPPERS = {"LLaVA": llava, "Qwen2-VL": qwen_vl, "Qwen2-Audio": qwen_audio, "Gemma 3": gemma3}


def seeded(build):
    torch.manual_seed(0)
    return build()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def first_step(model):
    """One step of training on text alone."""
    more = {"token_type_ids": torch.zeros_like(IDS)} if type(model).__name__.startswith("Gemma3") else {}
    model.train()(input_ids=IDS, **more).logits.float().logsumexp(-1).sum().backward()
    return [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_llamafactory_5083_a_folder_that_wraps_a_language_model_opens(kind, tmp_path):
    model = seeded(WRAPPERS[kind]).eval()
    model.save_pretrained(tmp_path)
    found = pretrained.causal_lm(str(tmp_path), torch.float32, torch.device("cpu"))
    assert type(found) is type(model)
    torch.testing.assert_close(logits(found), logits(model))
    empty = pretrained.skeleton(str(tmp_path))
    assert {n for n, _ in empty.named_parameters()} == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_lmms_finetune_11_towers_stay_frozen_while_text_is_learned(kind):
    model = veneer.attach(seeded(WRAPPERS[kind]), "lora", rank=2)
    with pytest.warns(UserWarning, match="adapted layers are not reached by this input"):
        trained = first_step(model)
    assert len(trained) == 28 and not [n for n in trained if "language_model" not in n]


def test_llamafactory_5083_a_training_on_text_ends_with_an_adapter_that_is_verified(tmp_path):
    given = tiny.settings(tmp_path, steps=3, compile="off", known="none", length=32)
    text = {**TEXT, "vocab_size": len(tiny.tokenizer()), "max_position_embeddings": 128}
    seeded(lambda: llava(text)).save_pretrained(tmp_path / "wrapper")
    tiny.tokenizer().save_pretrained(tmp_path / "wrapper")
    with pytest.warns(UserWarning, match="8 of 22 adapted layers are not reached by this input"):
        veneer.fit(veneer.Run(**{**given, "model": str(tmp_path / "wrapper")}))
    base = pretrained.causal_lm(str(tmp_path / "wrapper"), torch.float32, torch.device("cpu"))
    found = veneer.load(base, tmp_path / "run")
    assert len(changes(found, "default")) == 14
    record = (tmp_path / "run" / "adapter" / "veneer.json").read_text()
    assert '"probe": {' in record  # text for a wrapper too


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["vision_tower"], "vision_tower"),
        (["model.vision_tower"], "vision_tower"),
        (["language_model"], "language_model"),
        (r".*\.vision_tower", "vision_tower"),
    ],
)
def test_lmms_finetune_11_exclude_means_all_that_is_inside(exclude, left):
    model = veneer.attach(seeded(gemma3), "lora", to=["q_proj"], exclude=exclude, rank=2)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and not [n for n in trained if left in n]


def qwen_moe():
    own = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    config = T.Qwen2MoeConfig(**SIZES, **own, shared_expert_intermediate_size=16)
    return T.Qwen2MoeForCausalLM(config)


def deepseek():
    own = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1)
    ranks = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    more = dict(n_group=1, topk_group=1, first_k_dense_replace=1)
    sizes = {**SIZES, "num_key_value_heads": 4}
    return T.DeepseekV3ForCausalLM(T.DeepseekV3Config(**sizes, **own, **ranks, **more))


def mixtral():
    return T.MixtralForCausalLM(T.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


@pytest.mark.parametrize("build", [qwen_moe, deepseek, mixtral])
def test_vllm_31339_gates_with_few_outputs_do_not_stop_the_default(build):
    model = seeded(build)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        veneer.attach(model, "lora", rank=8)
        trained = first_step(model)
    assert all(p.grad is not None for n, p in model.named_parameters() if n in trained)
    frozen = [str(w.message) for w in said if "experts" in str(w.message)]
    assert frozen and re.search(r"hold \d+% of the model", frozen[0])  # fused experts stay frozen


def test_vllm_31339_a_rank_above_the_gates_outputs_is_capped_there_alone():
    with pytest.warns(UserWarning, match=r"shared_expert_gate"):
        model = veneer.attach(seeded(qwen_moe), "lora", rank=8)
    ranks = {s.name.rpartition(".")[2]: d.A.shape[0] for s, d in changes(model, "default")}
    assert ranks["q_proj"] == 8 and ranks.get("shared_expert_gate", 1) == 1


def by_peft(build, folder, **options):
    """PEFT's adapter with random numbers in `folder`; returns its model and the untouched base."""
    base, fresh = seeded(build), seeded(build)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    torch.manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.3)
    model.save_pretrained(folder)
    return model.eval(), fresh.eval()


def tied():
    return T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=True))


@pytest.mark.parametrize("kept", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]])
def test_peft_2777_a_tied_model_whose_ends_were_trained_apart_merges_untied(kept, tmp_path):
    model, base = by_peft(tied, tmp_path / "a", target_modules=["q_proj"], modules_to_save=kept)
    veneer.merge(veneer.load(base, tmp_path / "a"))
    base.save_pretrained(tmp_path / "merged")
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("added", [1, 2, 32])
def test_mergekit_328_layers_are_extracted_from_a_model_with_added_tokens(added):
    base, tuned = seeded(tied), seeded(tied)
    tuned.resize_token_embeddings(96 + added, mean_resizing=False)
    with torch.no_grad():
        for layer in tuned.model.layers:
            W = layer.self_attn.q_proj.weight
            W.add_(0.1 * torch.randn(32, 2) @ torch.randn(2, 32))
    with pytest.warns(UserWarning, match=r"embed_tokens"):
        cuts = extract(base, tuned, "x", rank=2, rest="drop")
    assert len(cuts) == 2 and max(c.error for c in cuts) < 1e-4


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("size", [98, 90])
def test_peft_1457_a_resized_vocabulary_opens_on_a_base_of_that_size(is_tied, size, tmp_path):
    def resized(seed):
        model = seeded(lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=is_tied)))
        torch.manual_seed(seed)
        model.resize_token_embeddings(size, mean_resizing=False)
        return model.eval()

    model = get_peft_model(resized(1), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.normal_(std=0.3)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    other = resized(2)
    if size < 96:  # shrunk: no random rows, the embeddings of both are the same
        torch.testing.assert_close(other.model.embed_tokens.weight, resized(1).model.embed_tokens.weight)
    veneer.load(other, tmp_path)
    ids = IDS.clamp(max=size - 1)
    got = other(input_ids=ids).logits
    torch.testing.assert_close(got, model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "trained", [{"trainable_token_indices": [5, 6]}, {"bias": "all"}, {"lora_bias": True}], ids=str
)
def test_vllm_36501_token_rows_and_biases_are_read(trained, tmp_path):
    def qwen():
        return T.Qwen2ForCausalLM(T.Qwen2Config(**SIZES))

    model, base = by_peft(qwen, tmp_path, target_modules=["q_proj"], task_type="CAUSAL_LM", **trained)
    torch.testing.assert_close(logits(veneer.load(base, tmp_path)), logits(model), rtol=1e-4, atol=1e-5)


def falcon_mamba():
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=8)
    return T.FalconMambaForCausalLM(T.FalconMambaConfig(**sizes))


def mamba():
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=8)
    return T.MambaForCausalLM(T.MambaConfig(**sizes))


@pytest.mark.parametrize("build", [falcon_mamba, mamba])
def test_peft_2556_a_layer_whose_weight_its_owner_reads_is_named_alone(build, tmp_path):
    _, base = by_peft(build, tmp_path, target_modules=["in_proj", "dt_proj"])
    with pytest.raises(FormatError) as e:
        veneer.load(base, tmp_path)
    assert "dt_proj" in str(e.value) and "in_proj" not in str(e.value)
    assert not veneer.adapters(base)


class Reader(nn.Module):
    """Calls a layer in evaluation and reads its weight in training, as Mamba-2's fused kernel does."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), layer

    def forward(self, x):
        h = self.first(x)
        if not self.training:
            return self.last(h)
        W = self.last.weight
        return h @ W if W.shape[0] == 8 and isinstance(self.last, nn.Embedding) else h @ W.flatten(1).mT


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)])
def test_peft_2274_a_layer_read_by_a_fused_kernel_is_named_after_an_evaluation(layer):
    model = veneer.attach(nn.Sequential(Reader(layer)), "lora", to=["first", "last"], rank=2)
    x = torch.randn(3, 8)
    model.eval()(x)
    with pytest.raises(SiteError, match=r"never called in the first training step: 0\.last"):
        model.train()(x)


KINDS = {
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": ("lokr_w1", "lokr_w2"),
    "LoKr of factors": ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    "OFT": ("oft_blocks",),
}


LEADS = ("lora_unet_mid_to_q", "lycoris_mid_to_q", "diffusion_model.mid.to_q")


@pytest.mark.parametrize(
    ("kind", "lead"), [(k, lead) for k in KINDS for lead in LEADS if k != "OFT" or "." not in lead]
)
def test_comfyui_4476_files_of_other_methods_are_named(kind, lead, tmp_path):
    tensors = {f"{lead}.{end}": torch.randn(2, 2) for end in KINDS[kind]}
    save_file({**tensors, f"{lead}.alpha": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=rf"{kind.split()[0]}.* \(LyCORIS\), which are not pairs"):
        read(tmp_path / "x.safetensors", base=Base(names=("mid.to_q",)))


@pytest.mark.parametrize(
    ("lead", "names", "found"),
    [
        ("diffusion_model.mid.to_q", (), "diffusion_model.mid.to_q"),
        ("diffusion_model.mid.to_q", ("mid.to_q",), "mid.to_q"),
        ("model.diffusion_model.mid.to_q", ("unet.mid.to_q", "mid.to_k"), "unet.mid.to_q"),
        ("unet.mid.to_q", ("unet.mid.to_q",), "unet.mid.to_q"),
    ],
)
@pytest.mark.parametrize("ends", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_diffusion_pipe_114_names_of_comfyui_open(lead, names, found, ends, tmp_path):
    down, up = torch.randn(4, 8), torch.randn(8, 4)
    tensors = {f"{lead}.{ends[0]}.weight": down, f"{lead}.{ends[1]}.weight": up}
    save_file({**tensors, f"{lead}.alpha": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    ((name, pair),) = read(tmp_path / "x.safetensors", base=Base(names=names)).sites.items()
    assert name == found and pair.scaling == 0.5
    torch.testing.assert_close(pair.product(), 0.5 * up @ down)


@pytest.mark.parametrize("part", ["factors", "all", "two"])
def test_diffusers_11675_names_with_the_adapters_name_open(part, tmp_path):
    def build():
        return T.LlamaForCausalLM(T.LlamaConfig(**SIZES))

    options = dict(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model, base = by_peft(build, tmp_path, **options)
    if part == "two":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    own = {k: t for k, t in model.state_dict().items() if part == "all" or "lora_" in k or "to_save" in k}
    assert any(".lora_A.default.weight" in k for k in own)
    save_file({k: t.clone() for k, t in own.items()}, tmp_path / "adapter_model.safetensors")
    if part == "two":
        with pytest.raises(FormatError, match=r"state dict with 2 adapters \(default, second\)"):
            veneer.load(base, tmp_path)
        return
    torch.testing.assert_close(logits(veneer.load(base, tmp_path)), logits(model), rtol=1e-4, atol=1e-5)
