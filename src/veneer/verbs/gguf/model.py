"""Writes a model of transformers as one GGUF file: sizes, tokenizer and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.convert import gguf_layout
from veneer.convert.base import Base, of_model
from veneer.convert.dialects.gguf import finish
from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError
from veneer.verbs.gguf import vocabulary

FILE = "model.gguf"
TYPES = {"fp32": ("ALL_F32", "F32"), "fp16": ("MOSTLY_F16", "F16"), "bf16": ("MOSTLY_BF16", "BF16")}


def write(model: nn.Module, tokenizer: Tokenizer, path: Path, dtype: str, name: str) -> None:
    """Writes the file. dtype: of the matrices; vectors stay in float32.

    Raises ConfigError for architectures, rotary scalings and tokenizers that are not supported.
    """
    gguf, base = gguf_layout.package(), of_model(model)
    arch = gguf_layout.architecture(base.kind)
    writer = gguf.GGUFWriter(path, arch.name)
    file_type, kind = TYPES[dtype]
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    _sizes(writer, model.config, base)
    vocabulary.write(writer, tokenizer, int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]
    for theirs, t in tensors(model, base).items():
        stored = gguf.GGMLQuantizationType[kind if t.ndim > 1 else "F32"]
        data = gguf.quants.quantize(t.float().cpu().numpy(), stored)
        writer.add_tensor(theirs, data, raw_dtype=stored)
    finish(writer)


def tensors(model: nn.Module, base: Base) -> dict[str, Tensor]:
    """Returns the weights by GGUF's names, rows in llama.cpp's order; a tied head is left out."""
    held = model.state_dict()
    if getattr(model.config, "tie_word_embeddings", False):
        held = {n: t for n, t in held.items() if not n.startswith("lm_head.")}
    parts = {n: n.rpartition(".") for n in held}
    called = gguf_layout.names(sorted({p[0] for p in parts.values()}), base.kind, base.layers or 0)
    return {
        f"{called[module]}.{ending}": gguf_layout.permuted(module, held[n], base)
        for n, (module, _, ending) in parts.items()
    }


def _sizes(writer: Any, config: Any, base: Base) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"GGUF: rotary scaling {rope['rope_type']!r} is not supported; export a folder, and convert it by"
            " llama.cpp's own script"
        )
    head = int(base.head or 0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(base.heads)
    writer.add_head_count_kv(base.kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def reloaded(folder: Path) -> nn.Module:
    """Returns the file's model, as transformers reads it, in float32."""
    from transformers import AutoModelForCausalLM, GgufConfig

    plain = GgufConfig(dequantize=True)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32, quantization_config=plain
    )
    return model.eval()
