"""Tiny random text-to-image pipelines on disk, of the classes of diffusers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from support import families

LENGTH, SIDE = 16, 16  # tokens of a caption, pixels of a picture's side
LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
WORDS = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
POOLED = 16  # numbers of the caption's embedding


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer, a token for every letter."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


def t5_tokenizer() -> Any:
    """T5's tokenizer, a token for every letter."""
    from transformers import T5TokenizerFast

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in LETTERS)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=LENGTH)


def clip(*, projected: bool = False, width: int = 32, **settings: Any) -> Any:
    """CLIP's text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {
        **families.HALF,
        "hidden_size": width,
        "vocab_size": len(WORDS),
        "max_position_embeddings": LENGTH,
    }
    ends = {"eos_token_id": len(WORDS) - 1, "bos_token_id": len(WORDS) - 2, "projection_dim": POOLED}
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(CLIPTextConfig(**{**sizes, **ends, **settings}))


COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}


@torch.no_grad()
def vae(scale: float = 1.0, **settings: Any) -> Any:
    """A VAE of two blocks: a latent spans 2 x 2 pixels.

    As in a trained one, the latents of different pictures differ far more than draws of one picture's: those
    of one colour are about 1 from those of another, and deviate by 0.05.
    """
    from diffusers import AutoencoderKL

    made = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=scale,
        **settings,
    )
    colours = [torch.tensor(c).view(3, 1, 1).expand(3, SIDE, SIDE) / 127.5 - 1 for c in COLOURS.values()]
    means = made.encode(torch.stack(colours)).latent_dist.mean
    gain = 1 / (scale * means.std(0).mean())
    last = made.quant_conv
    last.weight[4:], last.bias[4:] = 0.0, 2 * math.log(0.05)
    last.weight[:4] *= gain
    last.bias[:4] = gain * (last.bias[:4] - means.mean((0, 2, 3)))
    return made


def stable_diffusion(folder: Path, *, prediction: str = "v_prediction") -> Any:
    """A pipeline of Stable Diffusion. The velocity depends on the caption the most where noise is strong."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer(folder)
    torch.manual_seed(0)
    text, own = clip(), vae()
    return StableDiffusionPipeline(
        vae=own,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**families.UNET),
        scheduler=DDIMScheduler(clip_sample=False, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder: Path, *, prediction: str = "v_prediction") -> Any:
    """A pipeline of Stable Diffusion XL."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer(folder)
    torch.manual_seed(0)
    # The blocks of the smaller UNet: they learn more in the few steps of a test.
    sizes = {**families.XL, **families.UNET, "cross_attention_dim": 32 + 24}
    unet = UNet2DConditionModel(**sizes)
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projected=True, width=24),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, prediction_type=prediction),
        add_watermarker=False,
    )


def flux(folder: Path, *, guidance_embeds: bool = True, dynamic: bool = True) -> Any:
    """A pipeline of Flux: with both, like FLUX.1-dev; without both, like FLUX.1-schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    t5 = T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    sizes = {**families.FLUX, "in_channels": 16, "pooled_projection_dim": 32}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=dynamic, shift=3.0 if dynamic else 1.0
        ),
        vae=vae(0.4, shift_factor=0.1),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(**sizes, guidance_embeds=guidance_embeds),
    )


KINDS = {"StableDiffusion": stable_diffusion, "StableDiffusionXL": stable_diffusion_xl, "Flux": flux}


def save(kind: str, folder: Path, **settings: Any) -> Path:
    """Writes the pipeline of a kind and returns its folder."""
    KINDS[kind](folder, **settings).save_pretrained(folder)
    return folder
