"""Encodes parts as tokens: ids, which of them are learned, and the bytes of text each adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.data.chat import Part
from veneer.data.tokenizer import Tokenizer
from veneer.errors import DataError


class Tokens(NamedTuple):
    """ids (n,) int64; learned (n,) bool; n_bytes (n,) int64, the UTF-8 bytes each token adds to the text."""

    ids: Tensor
    learned: Tensor
    n_bytes: Tensor

    def first(self, n: int) -> Tokens:
        """Returns the first n tokens."""
        return Tokens(*(t[:n] for t in self))


Token = tuple[int, bool, int]


def encode(parts: Sequence[Part], tokenizer: Tokenizer) -> Tokens:
    """Returns the tokens of one row: the tokenizer's beginning token, if it has one, then the parts.

    A text that spells its own beginning or end token gets no second one.
    """
    found: list[Token] = []
    begins = [] if parts and parts[0].rendered else beginning(tokenizer)
    for is_end, run in groupby(parts, lambda p: p.text is None):
        stretch = list(run)
        if not is_end:
            found += _stretch(stretch, tokenizer)
            continue
        own = (
            bool(found)
            and parts[0].special
            and not parts[0].rendered
            and found[-1][0] == end_token(tokenizer)
        )
        found += [(end_token(tokenizer), p.learned, 0) for p in stretch[own:]]
    if begins and not (parts[0].special and found and found[0][0] == begins[0]):
        found = [(begins[0], False, 0), *found]
    ids, learned, n_bytes = zip(*found, strict=True) if found else ((), (), ())
    return Tokens(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(learned, dtype=torch.bool),
        torch.tensor(n_bytes, dtype=torch.int64),
    )


def beginning(tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids that a document begins with.

    That is the beginning token if the tokenizer adds it itself, or if it is also the end token: such
    models (GPT-2, the built-in one) were trained with it between documents.
    """
    own = list(tokenizer("")["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    return [bos] if own[:1] == [bos] or bos == tokenizer.eos_token_id else []


def end_token(tokenizer: Tokenizer) -> int:
    """Returns the id of the end-of-text token. Raises DataError if its eos_token is unset."""
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the tokenizer has no end-of-text token, so the model could not learn to stop; set its eos_token"
        )
    return end


def _stretch(parts: list[Part], tokenizer: Tokenizer) -> Iterator[Token]:
    """Yields the tokens of the joined text; of each part if a token would cross a border of what is learned.

    Generation starts at that border, so training must split there too.
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


def _spans(text: str, tokenizer: Tokenizer, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns token ids and the characters (from, to) of each."""
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise DataError(
            f"the tokenizer must be a fast one that reports character offsets, got {kind};"
            f" provide a tokenizer.json"
        )
    found = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        split_special_tokens=not special,
        verbose=False,
    )
    return found["input_ids"], found["offset_mapping"]
