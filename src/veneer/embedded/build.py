"""Builds tokenizer and weights of the built-in model; saves checkpoints and the finished folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veneer.data.tokenizer import Tokenizer
from veneer.embedded import texts

END, PAD = "<|end|>", "<|pad|>"
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def train_tokenizer(documents: list[texts.Document], vocabulary: int) -> Any:
    """Returns a byte-level BPE trained on the documents, as a tokenizer without special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((d.text for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=SIZES["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Tokenizer, seed: int) -> nn.Module:
    """Returns the untrained Llama in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES, **ends)
    )
    return model


def save_checkpoint(
    folder: Path, model: nn.Module, optimisers: list[torch.optim.Optimizer], meta: dict[str, Any]
) -> None:
    """Writes weights, optimiser state and `meta` into state.safetensors, replaced atomically."""
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for i, optimiser in enumerate(optimisers):
        for j, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{j}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    temporary = folder / "state.tmp"
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"meta": json.dumps(meta)})
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    os.replace(temporary, folder / "state.safetensors")


def load_checkpoint(
    folder: Path, model: nn.Module, optimisers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Loads the checkpoint in place and returns its `meta`; without one, returns step 0."""
    file = folder / "state.safetensors"
    if not file.exists():
        return {"step": 0, "seconds": 0.0, "tokens": 0}
    tensors = load_file(file)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(tensors[f"model.{n}"])
    for i, optimiser in enumerate(optimisers):
        whole = optimiser.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"optimiser.{i}."):
                _, _, j, key = name.split(".", 3)
                whole["state"].setdefault(int(j), {})[key] = value
        optimiser.load_state_dict(whole)
    with safe_open(file, "pt") as f:
        meta: dict[str, Any] = json.loads(f.metadata()["meta"])
    return meta


def export(folder: Path, model: nn.Module, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Writes the model in bfloat16, its tokenizer and training.json, for AutoModelForCausalLM."""
    copy = build_model(tokenizer, 0)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "training.json").write_text(
        json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
