"""Small random models of the real classes of transformers and diffusers, with inputs and losses."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
TEXT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**TEXT, "intermediate_size": 48}
DECODER = {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False}
HEADED = {**DECODER, "head_dim": 8}
PICTURE = {"image_size": 32, "num_channels": 3}


class Family(NamedTuple):
    """A small model: names of its class and configuration, settings, and the kind of its inputs.

    to, exclude: layers that the adapter changes. note: for the table.
    """

    title: str
    model: str
    config: str
    settings: Mapping[str, Any]
    inputs: str = "causal"
    to: Any = "all-linear"
    package: str = "transformers"
    note: str = ""
    exclude: Any = ()
    trains: bool = False  # in training mode: in evaluation mode the class has no backward


BY_NAME = "convolutions by name: the head is its only linear layer"
EXPERTS = r".*(self_attn|experts\.\d+)\.\w+"
STACKS = "one pair for each fused expert; `all-linear` leaves experts and router frozen"
FUSED = "the fused matrix gets one adapter, as PEFT gives it"
CONVOLUTIONS = r".*(conv\w*|convolution|dwconv|shortcut\.convolution)"
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}
SPEECH = {
    "vocab_size": 96,
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
HALF = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

FAMILIES = {
    "llama": Family("Llama", "LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": Family("Mistral", "MistralForCausalLM", "MistralConfig", HEADED),
    "qwen2": Family("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen3": Family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", HEADED),
    "gemma": Family("Gemma", "GemmaForCausalLM", "GemmaConfig", HEADED),
    "phi3": Family("Phi-3", "Phi3ForCausalLM", "Phi3Config", {**DECODER, "pad_token_id": 0}, note=FUSED),
    "gpt2": Family(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        note=FUSED,
    ),
    "gpt-neox": Family("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", WIDE, note=FUSED),
    "falcon": Family("Falcon", "FalconForCausalLM", "FalconConfig", TEXT, note=FUSED),
    "mixtral": Family(
        "Mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        to=EXPERTS,
        note=STACKS,
    ),
    "qwen2-moe": Family(
        "Qwen2-MoE",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **DECODER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
        to=EXPERTS,
        note=f"{STACKS}; PEFT misreads the names of shared experts",
    ),
    "qwen3-moe": Family(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**HEADED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        to=EXPERTS,
        note=STACKS,
    ),
    "deepseek": Family(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DECODER,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "v_head_dim": 8,
            "head_dim": 4,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
        },
        to=EXPERTS,
        note=f"{STACKS}; PEFT misreads the names of shared experts",
    ),
    "gpt-oss": Family(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        {**HEADED, "num_local_experts": 4, "num_experts_per_tok": 2},
        to=EXPERTS,
        note=STACKS,
    ),
    "llama4": Family(
        "Llama 4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **HEADED,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "pad_token_id": 0,
        },
        to=EXPERTS,
        note=STACKS,
    ),
    "mamba": Family(
        "Mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        to=["in_proj", "x_proj"],
        note="the mixer reads `dt_proj`'s weight itself; PEFT refuses `out_proj`",
    ),
    "mamba2": Family(
        "Mamba-2",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        to=["in_proj"],
        note="PEFT refuses `out_proj`",
    ),
    "rwkv": Family(
        "RWKV-4",
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "context_length": 64,
            "attention_hidden_size": 32,
            "intermediate_size": 48,
        },
        note="transformers' only RWKV; no backward in evaluation mode",
        trains=True,
    ),
    "rwkv6": Family(
        "RWKV-6",
        "Rwkv6ForCausalLM",
        "Rwkv6Config",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "head_size": 8,
            "intermediate_size": 48,
        },
        note="a plain model of our own from the paper's formulas",
        package="support.rwkv6",
    ),
    "bert": Family("BERT", "BertForMaskedLM", "BertConfig", WIDE, "masked"),
    "roberta": Family(
        "RoBERTa", "RobertaForMaskedLM", "RobertaConfig", {**WIDE, "pad_token_id": 0}, "masked"
    ),
    "deberta": Family("DeBERTa-v2", "DebertaV2ForMaskedLM", "DebertaV2Config", WIDE, "masked"),
    "t5": Family(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 96,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "sequences",
    ),
    "whisper": Family("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", SPEECH, "speech"),
    "vit": Family(
        "ViT", "ViTForImageClassification", "ViTConfig", {**WIDE, **PICTURE, "patch_size": 8}, "pictures"
    ),
    "dinov2": Family(
        "DINOv2",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**TEXT, **PICTURE, "patch_size": 8, "mlp_ratio": 2},
        "pictures",
    ),
    "convnext": Family(
        "ConvNeXt",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {
            **PICTURE,
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "layer_scale_init_value": 1.0,
            "initializer_range": 0.2,
        },
        "pictures",
    ),
    "resnet": Family(
        "ResNet",
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "pictures",
        to=CONVOLUTIONS,
        note=BY_NAME,
    ),
    "mobilenet": Family(
        "MobileNetV2",
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {
            "image_size": 32,
            "depth_multiplier": 0.25,
            "depth_divisible_by": 4,
            "min_depth": 4,
            "tf_padding": False,
            "initializer_range": 0.4,
        },
        "pictures",
        to=r".*(expand_1x1|reduce_1x1)\.convolution",
        note=BY_NAME,
    ),
    "clip": Family(
        "CLIP",
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**HALF, "vocab_size": 96, "max_position_embeddings": 16, "eos_token_id": 2},
            "vision_config": {**HALF, "image_size": 32, "patch_size": 8},
            "projection_dim": 16,
        },
        "captions",
    ),
    "unet": Family("Stable Diffusion 1.5", "UNet2DConditionModel", "", UNET, "noise", package="diffusers"),
    "unet-xl": Family(
        "Stable Diffusion XL", "UNet2DConditionModel", "", {**UNET, **XL}, "noise-xl", package="diffusers"
    ),
    "flux": Family("Flux", "FluxTransformer2DModel", "", FLUX, "flow", package="diffusers"),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Returns the model in evaluation mode; the same seed gives the same weights."""
    family = FAMILIES[name]
    package = importlib.import_module(family.package)
    kind = getattr(package, family.model)
    torch.manual_seed(seed)
    if family.package == "diffusers":
        made = kind(**family.settings)
    else:
        labels = {"num_labels": 5} if family.inputs == "pictures" else {}
        made = kind(getattr(package, family.config)(**family.settings, **labels))
    found: nn.Module = made.eval()
    return found


def inputs(name: str) -> Inputs:
    """Returns the arguments of one forward, with labels where the model computes a loss from them."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (4, 12), generator=draw)
    found: dict[str, Callable[[], Inputs]] = {
        "causal": lambda: {"input_ids": ids, "labels": ids},
        "masked": lambda: {"input_ids": ids, "labels": ids.roll(1, 1)},
        "sequences": lambda: {"input_ids": ids, "labels": ids[:, :7].contiguous()},
        "speech": lambda: {
            "input_features": torch.randn(4, 16, 32, generator=draw),
            "labels": ids[:, :7].contiguous(),
        },
        "pictures": lambda: {
            "pixel_values": torch.randn(4, 3, 32, 32, generator=draw),
            "labels": torch.arange(4),
        },
        "captions": lambda: {
            "input_ids": ids,
            "pixel_values": torch.randn(4, 3, 32, 32, generator=draw),
            "return_loss": True,
        },
        "noise": lambda: _noise(draw),
        "noise-xl": lambda: {
            **_noise(draw),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(4, 16, generator=draw),
                "time_ids": torch.ones(4, 6),
            },
        },
        "flow": lambda: {
            "hidden_states": torch.randn(2, 16, 4, generator=draw),
            "encoder_hidden_states": torch.randn(2, 6, 32, generator=draw),
            "pooled_projections": torch.randn(2, 16, generator=draw),
            "timestep": torch.tensor([0.3, 0.7]),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
            "txt_ids": torch.zeros(6, 3),
        },
    }
    return found[FAMILIES[name].inputs]()


def _noise(draw: torch.Generator) -> Inputs:
    return {
        "sample": torch.randn(4, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([10, 200, 500, 900]),
        "encoder_hidden_states": torch.randn(4, 6, 32, generator=draw),
    }


def outputs(model: nn.Module, given: Inputs) -> Tensor:
    """Returns the model's numbers: logits, or the predicted noise."""
    found = model(**given)
    for key in ("logits", "sample", "logits_per_image"):
        if getattr(found, key, None) is not None:
            value: Tensor = getattr(found, key)
            return value
    raise AssertionError(type(found).__name__)


def loss(model: nn.Module, given: Inputs) -> Tensor:
    """Returns the loss of one step: the model's own, or the squared error of a fixed target."""
    if "labels" in given or "return_loss" in given:
        own: Tensor = model(**given).loss
        return own
    found = outputs(model, given)
    target = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    return (found - target).square().mean()
