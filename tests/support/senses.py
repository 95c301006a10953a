"""A tiny random Whisper with its processor on disk, and clips and pictures of known answers."""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import Any

import torch
from support import tiny
from support.pipelines import COLOURS

SPOKEN = ("<|startoftranscript|>", "<|endoftext|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>")
TONES = {"low": 300.0, "mid": 900.0, "high": 2700.0}  # a word is a tone of this pitch
RATE = 16000


def whisper(folder: Path, **config: Any) -> Path:
    """A random Whisper whose window is one second, with feature extractor and tokenizer."""
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    words = tiny.tokenizer()
    own = type(words)(tokenizer_object=words.backend_tokenizer, eos_token=SPOKEN[1], pad_token=SPOKEN[1])
    own.add_special_tokens({"additional_special_tokens": list(SPOKEN)})
    start, end = own.convert_tokens_to_ids(SPOKEN[:2])
    sizes = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 16, "init_std": 0.3}
    heads = {
        f"{side}_{k}": v
        for side in ("encoder", "decoder")
        for k, v in (("attention_heads", 2), ("ffn_dim", 48))
    }
    special = {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end, "bos_token_id": end}
    torch.manual_seed(0)
    made = WhisperConfig(
        vocab_size=len(own),
        max_source_positions=50,
        max_target_positions=24,
        **{**sizes, **heads, **special, **config},
    )
    model = WhisperForConditionalGeneration(made)
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    model.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    WhisperProcessor(extractor, own).save_pretrained(folder)
    return folder


def clip(path: Path, words: str, *, rate: int = RATE, seconds: float = 0.3, seed: int = 0) -> Path:
    """A clip in which every word is a tone, with a little noise."""
    noise = torch.Generator().manual_seed(seed)
    at = torch.arange(round(seconds * rate)) / rate
    waves = [0.3 * torch.sin(2 * math.pi * TONES[w] * at) for w in words.split()]
    sound = torch.cat(waves) + 0.01 * torch.randn(len(at) * len(waves), generator=noise)
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((sound.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes())
    return path


def spoken(folder: Path, n: int, seed: int) -> Path:
    """A folder of clips with their words beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    names = list(TONES)
    for i in range(n):
        words = " ".join(names[k] for k in torch.randint(3, (1 + i % 3,), generator=draw).tolist())
        clip(folder / f"{i:03d}.wav", words, seed=seed * 1000 + i)
        (folder / f"{i:03d}.txt").write_text(words + "\n", encoding="utf-8")
    return folder


SHAPES = ("circle", "cross", "square")


def picture_base(folder: Path, family: str) -> Path:
    """A random classifier of pictures without its head, with its image processor."""
    import transformers
    from support import families

    made = families.FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, made.config)(**made.settings)
    kind = getattr(transformers, made.model.replace("ForImageClassification", "Model"))
    kind(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def picture(shape: str, seed: int) -> Any:
    """A Pillow picture of a shape, at a random place and of a random size and colour."""
    from PIL import Image, ImageDraw

    draw = torch.Generator().manual_seed(seed)
    x, y, r = (int(torch.randint(a, b, (1,), generator=draw)) for a, b in ((11, 21), (11, 21), (6, 10)))
    colour = tuple(torch.randint(140, 256, (3,), generator=draw).tolist())
    found = Image.new("RGB", (32, 32), (20, 20, 40))
    pen = ImageDraw.Draw(found)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=3)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    else:
        pen.line((x - r, y - r, x + r, y + r), fill=colour, width=3)
        pen.line((x - r, y + r, x + r, y - r), fill=colour, width=3)
    return found


def pictured(folder: Path, n: int, seed: int) -> Path:
    """A folder for every shape with n pictures in each."""
    for k, shape in enumerate(SHAPES):
        (folder / shape).mkdir(parents=True)
        for i in range(n):
            picture(shape, 1000 * seed + 100 * k + i).save(folder / shape / f"{i:03d}.png")
    return folder


def coloured(folder: Path, n: int) -> Path:
    """A folder of pictures in one colour each, with a caption that names the colour beside each."""
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(n):
        name = list(COLOURS)[i % 3]
        Image.new("RGB", (24, 20), COLOURS[name]).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {name} wall")
    return folder


def settings(model: Path, task: str, data: Path, out: Path, /, **changed: Any) -> dict[str, Any]:
    """Returns a short training of a task on a folder that is learned and measured."""
    own = {
        "model": str(model),
        "task": task,
        "data": str(data),
        "valid": str(data),
        "known": "none",
        "options": {"rank": 8},
        "lr": 1e-2,
        "steps": 60,
        "precision": "fp32",
        "device": "cpu",
        "report": False,
        "out": str(out),
    }
    return {**own, **changed}
