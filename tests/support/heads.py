"""Tiny random encoders and decoders as bases without a head, and rows of texts for tasks on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support import tiny

ENDS = dict(bos_token=tiny.END, eos_token=tiny.END, pad_token=tiny.END)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def base(folder: Path, kind: str = "bert", **changed: Any) -> Path:
    """Saves a tiny random model without a head, and its tokenizer.

    kind: bert, roberta, distilbert or llama; masked, t5 and lm have their heads.
    """
    import transformers as t

    torch.manual_seed(0)
    own = {"vocab_size": len(tiny.tokenizer()), "pad_token_id": tiny.tokenizer().pad_token_id, **changed}
    places = {"max_position_embeddings": 128}
    if kind == "bert":
        model = t.BertModel(t.BertConfig(**SIZES, **places, **own))
    elif kind == "roberta":
        model = t.RobertaModel(t.RobertaConfig(**SIZES, max_position_embeddings=512, **own))
    elif kind == "distilbert":
        sizes = dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4)
        model = t.DistilBertModel(t.DistilBertConfig(**sizes, **places, **own))
    elif kind == "lm":
        return tiny.base(folder)
    elif kind == "masked":
        model = t.BertForMaskedLM(t.BertConfig(**SIZES, **places, **own))
    elif kind == "t5":
        sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        model = t.T5ForConditionalGeneration(t.T5Config(**sizes, **own, decoder_start_token_id=0))
    else:
        model = t.LlamaModel(t.LlamaConfig(**SIZES, **places, num_key_value_heads=2, **own))
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    if kind == "masked":  # 12 is a letter of its alphabet, which no text of the tests has
        marks = {"mask_token": tiny.tokenizer().convert_ids_to_tokens(12)}
        made = type(tiny.tokenizer())
        masked = made(tokenizer_object=tiny.tokenizer().backend_tokenizer, **marks, **ENDS)
        masked.save_pretrained(folder)
    return folder


def animal(seed: int) -> dict[str, Any]:
    """Returns a text and the animal that it names more often."""
    text = tiny.text(seed, 4 + seed % 9)
    own = "cat" if seed % 2 else "dogs"
    words = [own if w in ("cat", "dogs") else w for w in text.split()]
    return {"text": " ".join([own, *words]), "label": own}


def settings(root: Path, task: str, out: Path, **changed: Any) -> dict[str, Any]:
    """Returns a short training of a task on root/base and root/{train,valid,known}.jsonl."""
    own = {
        "model": str(root / "base"),
        "task": task,
        "data": str(root / "train.jsonl"),
        "valid": str(root / "valid.jsonl"),
        "known": str(root / "known.jsonl"),
        "options": {"rank": 4, "dropout": 0.1},
        "lr": 2e-2,
        "steps": 14,
        "batch": 8,
        "length": 64,
        "accumulate": 2,
        "eval_every": 4,
        "save_every": 3,
        "precision": "fp32",
        "device": "cpu",
        "report": False,
        "out": str(out),
    }
    return {**own, **changed}


def write(root: Path, make: Any, rows: tuple[int, int, int] = (64, 24, 16)) -> None:
    """Writes rows made from seeds as train, valid and known."""
    for i, (part, n) in enumerate(zip(("train", "valid", "known"), rows, strict=True)):
        tiny.jsonl(root / f"{part}.jsonl", *(make(1000 * i + k) for k in range(n)))
