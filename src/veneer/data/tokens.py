"""Encodes parts as tokens: ids, which of them are learned, and the bytes of text each adds."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
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
Span = tuple[int, int, int]  # token, first character, character after the last
PIECE = 1 << 18  # characters that are encoded at once
CONTEXT = 64  # characters before a piece that its first tokens may look at


def encode(parts: Sequence[Part], tokenizer: Tokenizer) -> Tokens:
    """Returns the tokens of one row: the tokenizer's beginning token, if it has one, then the parts.

    A text that spells its own beginning or end token gets no second one.
    """
    found = _Found()
    begins = [] if parts and parts[0].rendered else beginning(tokenizer)
    for is_end, run in groupby(parts, lambda p: p.text is None):
        stretch = list(run)
        if not is_end:
            found.add(_stretch(stretch, tokenizer))
            continue
        own = (
            bool(found.ids)
            and parts[0].special
            and not parts[0].rendered
            and found.ids[-1] == end_token(tokenizer)
        )
        found.add((end_token(tokenizer), p.learned, 0) for p in stretch[own:])
    if begins and not (parts[0].special and found.ids and found.ids[0] == begins[0]):
        found = _Found().add([(begins[0], False, 0)]).add(zip(*found.columns, strict=True))
    return found.tokens()


class _Found:
    """Tokens in three arrays: a long text has too many for a list of tuples."""

    def __init__(self) -> None:
        self.ids, self.learned, self.n_bytes = array("q"), array("b"), array("q")

    @property
    def columns(self) -> tuple[array[int], ...]:
        return self.ids, self.learned, self.n_bytes

    def add(self, tokens: Iterable[Token]) -> _Found:
        for id_, is_learned, n in tokens:
            self.ids.append(id_)
            self.learned.append(is_learned)
            self.n_bytes.append(n)
        return self

    def tokens(self) -> Tokens:
        kinds = (torch.int64, torch.int8, torch.int64)
        ids, learned, n_bytes = (_tensor(c, k) for c, k in zip(self.columns, kinds, strict=True))
        return Tokens(ids, learned.bool(), n_bytes)


def _tensor(column: array[int], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(column, dtype=dtype).clone() if column else torch.zeros(0, dtype=dtype)


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
    if len(parts) > 1 and any(s < b < e for b in changes for s, e in zip(*spans, strict=True)):
        yield from (t for p in parts for t in _stretch([p], tokenizer))
        return
    done = part = 0
    for token, start, end in zip(ids, *spans, strict=True):
        while part < len(parts) - 1 and max(start, end - 1) >= borders[part]:
            part += 1
        yield token, parts[part].learned, len(text[done:end].encode())
        done = max(done, end)


def _spans(text: str, tokenizer: Tokenizer, special: bool) -> tuple[array[int], list[array[int]]]:
    """Returns token ids and the characters (from, to) of each, as two arrays.

    A long text is encoded in pieces: a tokenizer takes over a hundred bytes of memory for each byte of text.
    """
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise DataError(
            f"the tokenizer must be a fast one that reports character offsets, got {kind};"
            f" provide a tokenizer.json"
        )

    def encoded(begin: int, stop: int) -> list[Span]:
        found = tokenizer(
            text[begin:stop],
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=not special,
            verbose=False,
        )
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return [(token, begin + start, begin + end) for token, (start, end) in pairs]

    ids, starts, ends = array("q"), array("q"), array("q")
    at = 0
    while at < len(text):
        stop = _border(text, at + PIECE)
        spans = encoded(max(0, at - CONTEXT), stop)
        if at and not any(start == at for _, start, _ in spans):  # a token would cross the border
            spans = encoded(at, stop)
        for token, start, end in spans:
            if start >= at:
                ids.append(token)
                starts.append(start)
                ends.append(end)
        at = stop
    return ids, [starts, ends]


def _border(text: str, wanted: int) -> int:
    """Returns the last place up to `wanted` where a single space follows a word, else `wanted` itself.

    Tokenizers begin a token at such a space, so that pieces have the tokens of the whole.
    """
    if wanted >= len(text):
        return len(text)
    at = wanted
    while (at := text.rfind(" ", wanted - PIECE // 2, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
    return wanted
