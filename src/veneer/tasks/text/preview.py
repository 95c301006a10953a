"""Shows text token by token, with the tokens that are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.data.pack import Window
from veneer.data.tokenizer import Tokenizer
from veneer.tasks.text.samples import learned_tokens

SHOWN = 3  # rows, of those that begin in the first LOOKED windows
LOOKED = 100
TOKENS = 120
BACK = 4  # tokens that are decoded before one, as its text may depend on those before it
MOST = 3  # bytes of a character that do not end it


def preview(windows: Sequence[Window], tokenizer: Tokenizer) -> list[list[list[Any]]]:
    """Returns the beginnings of the first rows, each a list of [text of a token, is it learned]."""
    found = []
    every = [s for w in windows[:LOOKED] for s in w]
    whole = [s for s in every if s.inputs[0] == tokenizer.bos_token_id]  # rows begin there, if anywhere
    for s in (whole or every)[:SHOWN]:
        ids, learned = learned_tokens(s)
        texts = pieces(ids[:TOKENS], tokenizer)
        found.append([[text, was] for text, was in zip(texts, learned, strict=False)])
    return found


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Returns what each token adds to the text; the last token of a character adds all of it."""
    found: list[str] = []
    ends = [0]  # places where no character is open
    for i in range(len(ids)):
        begin = next((e for e in reversed(ends) if e <= ends[-1] - BACK), 0)
        before, now = (
            tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False) for end in (ends[-1], i + 1)
        )
        if now.endswith("\N{REPLACEMENT CHARACTER}") and i + 1 < len(ids) and i - ends[-1] < MOST:
            found.append("")
        else:
            found.append(now[len(before) :] if now.startswith(before) else tokenizer.decode([ids[i]]))
            ends.append(i + 1)
    return found
