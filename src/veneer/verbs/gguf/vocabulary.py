"""Writes a byte-level BPE tokenizer into a GGUF file."""

from __future__ import annotations

import json
from typing import Any

from veneer.convert import gguf_layout
from veneer.data.tokens import beginning
from veneer.errors import ConfigError

UNUSED = "[PAD{}]"  # rows of the embedding beyond the tokenizer


def write(writer: Any, tokenizer: Any, size: int) -> None:
    """Adds tokens, merges and special ids. size: rows of the embedding. Raises ConfigError."""
    gguf = gguf_layout.package()
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    if written["model"]["type"] != "BPE" or written["model"].get("byte_fallback"):
        kind = written["model"]["type"]
        raise ConfigError(f"GGUF: the tokenizer must be byte-level BPE, got {kind}; export a folder instead")
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {t["id"]: t["special"] for t in written["added_tokens"]}
    types = gguf.TokenType
    tokens = [by_id.get(i, UNUSED.format(i)) for i in range(size)]
    kinds = [
        (types.CONTROL if added[i] else types.USER_DEFINED)
        if i in added
        else (types.NORMAL if i in by_id else types.UNUSED)
        for i in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(before(written["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in written["model"]["merges"]])
    for add, i in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if i is not None:
            add(i)
    writer.add_add_bos_token(bool(beginning(tokenizer)))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def before(found: Any) -> str:
    """Returns llama.cpp's name for the splitting before BPE. Raises ConfigError for an unknown one."""
    steps = found["pretokenizers"] if found and found["type"] == "Sequence" else [found or {"type": "none"}]
    kinds = [step["type"] for step in steps]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        if r"\p{N}{1,3}" in patterns[0]:
            return "llama-bpe"
        if r"|\p{N}|" in patterns[0]:
            return "qwen2"
    raise ConfigError(f"GGUF: the tokenizer splits texts by {' and '.join(kinds)}, which has no name in GGUF")
