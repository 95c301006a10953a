"""Parts into tokens: ids, which of them are learned, and how many bytes of text each stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.data.chat import Part
from veneer.errors import DataError


class Tokens(NamedTuple):
    """ids (n,) int64, learned (n,) bool, n_bytes (n,) int64: the UTF-8 bytes by which a token extends the text."""

    ids: Tensor
    learned: Tensor
    n_bytes: Tensor

    def first(self, n: int) -> Tokens:
        """The first n tokens."""
        return Tokens(*(t[:n] for t in self))


Token = tuple[int, bool, int]


def encode(parts: Sequence[Part], tokenizer: Any) -> Tokens:
    """The tokens of one row: the tokenizer's beginning token where it has one to begin with, then the parts."""
    found: list[Token] = [(i, False, 0) for i in beginning(tokenizer)]
    if parts and parts[0].special:
        found = []  # a chat template writes its own
    for is_end, run in groupby(parts, lambda p: p.text is None):
        stretch = list(run)
        found += (
            [(end_token(tokenizer), p.learned, 0) for p in stretch]
            if is_end
            else _stretch(stretch, tokenizer)
        )
    ids, learned, n_bytes = zip(*found, strict=True) if found else ((), (), ())
    return Tokens(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(learned, dtype=torch.bool),
        torch.tensor(n_bytes, dtype=torch.int64),
    )


def beginning(tokenizer: Any) -> list[int]:
    """What a document begins with: the token that the tokenizer itself puts first, or the one that separates documents.

    A tokenizer whose beginning token is its end token (GPT-2, the built-in model) was trained with it between documents.
    """
    own = list(tokenizer("")["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    return [bos] if own[:1] == [bos] or bos == tokenizer.eos_token_id else []


def end_token(tokenizer: Any) -> int:
    """The id of the end-of-text token. Raises DataError for a tokenizer without one."""
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the tokenizer has no end-of-text token, without which the model cannot learn where a text ends; set its eos_token"
        )
    return end


def _stretch(parts: list[Part], tokenizer: Any) -> Iterator[Token]:
    """The tokens of the parts' text as a whole; apart where a token would reach from what is read into what is learned.

    Generation starts exactly at that border, so training must too.
    """
    text = "".join(p.text or "" for p in parts)
    ids, spans = _spans(text, tokenizer, parts[0].special)
    borders = list(accumulate(len(p.text or "") for p in parts))
    changes = {b for b, p, q in zip(borders, parts, parts[1:], strict=False) if p.learned != q.learned}
    if len(parts) > 1 and any(start < b < end for b in changes for start, end in spans):
        yield from (t for p in parts for t in _stretch([p], tokenizer))
        return
    done = part = 0
    for token, (start, end) in zip(ids, spans, strict=True):
        while part < len(parts) - 1 and max(start, end - 1) >= borders[part]:
            part += 1
        yield token, parts[part].learned, len(text[done:end].encode())
        done = max(done, end)


def _spans(text: str, tokenizer: Any, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and the characters (from, to) that each comes from."""
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise DataError(
            f"{kind} does not say which characters a token comes from; use the tokenizer's fast form, a tokenizer.json"
        )
    found = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        split_special_tokens=not special,
        verbose=False,
    )
    return found["input_ids"], found["offset_mapping"]
