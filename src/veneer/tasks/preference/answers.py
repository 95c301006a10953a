"""Tokens of a prompt and of the answers to it; a batch of them for one pass of the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.data.chat import examples
from veneer.data.chat.masks import Part
from veneer.data.pack import IGNORED
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.data.tokenizer import Tokenizer
from veneer.data.tokens import Tokens, encode
from veneer.errors import DataError


class Answer(NamedTuple):
    """ids (m,); labels (m,): the same tokens, IGNORED where nothing is learned; m >= 1."""

    ids: Tensor
    labels: Tensor


class Asked(NamedTuple):
    """A prompt (n,) and the answers to it."""

    prompt: Tensor
    answers: tuple[Answer, ...]

    @property
    def whole(self) -> int:
        """Returns the number of predictions in the longest answer behind the prompt."""
        return len(self.prompt) + max(len(a.ids) for a in self.answers) - 1

    def cut(self, window: int) -> Asked:
        """Returns at most `window` predictions: the prompt's beginning goes first, then ends of answers."""
        kept = max(1, window + 1 - max(len(a.ids) for a in self.answers))
        prompt = self.prompt[-kept:]
        most = window + 1 - len(prompt)
        return Asked(prompt, tuple(Answer(a.ids[:most], a.labels[:most]) for a in self.answers))


def asked(rows: Sequence[Row], reading: Reading, tokenizer: Tokenizer) -> Asked:
    """Returns the common prompt of the rows and their answers. Raises DataError if the prompts differ."""
    every = [_parts(row, reading, tokenizer) for row in rows]
    found = [_split(encode(parts, tokenizer)) for parts in every]
    if not _alike(found) and rows[0].kind == "pair":  # a token of one answer reaches into the prompt
        found = [_apart(parts, tokenizer) for parts in every]
    if not _alike(found):
        raise DataError(
            f"{rows[0].where}: the chat template must write the prompts of 'chosen' and 'rejected' alike, and"
            " does not; choose another template by chat_template"
        )
    return Asked(found[0][0], tuple(answer for _, answer in found))


def _parts(row: Row, reading: Reading, tokenizer: Tokenizer) -> list[Part]:
    found = examples(row, tokenizer, special=reading.special_tokens != "spell")
    if len(found) != 1:
        raise DataError(
            f"{row.where}: the chat template rewrites earlier turns of the answer; give each turn its own row"
        )
    return found[0]


def _split(tokens: Tokens) -> tuple[Tensor, Answer]:
    learned = tokens.learned.nonzero()
    n = int(learned[0]) if len(learned) else len(tokens.ids) - 1
    labels = torch.where(tokens.learned, tokens.ids, IGNORED)
    return tokens.ids[:n], Answer(tokens.ids[n:], labels[n:])


def _alike(found: Sequence[tuple[Tensor, Answer]]) -> bool:
    return all(torch.equal(prompt, found[0][0]) for prompt, _ in found)


def _apart(parts: Sequence[Part], tokenizer: Tokenizer) -> tuple[Tensor, Answer]:
    """Encodes prompt and answer each alone."""
    before = list(takewhile(lambda p: not p.learned, parts))
    own = [p._replace(rendered=True) for p in parts[len(before) :]]  # without a beginning token of its own
    prompt, answer = encode(before, tokenizer), encode(own, tokenizer)
    return prompt.ids, Answer(answer.ids, torch.where(answer.learned, answer.ids, IGNORED))


def sequence(prompt: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns inputs (t,) and the labels (t,) of the token after each."""
    read = torch.full_like(prompt, IGNORED)
    return torch.cat([prompt, ids])[:-1], torch.cat([read, labels])[1:]


def stacked(every: Sequence[tuple[Tensor, Tensor]], width: int, pad: int) -> dict[str, Tensor]:
    """Returns input_ids and labels (b, width); padding comes last, where no label is."""
    ids, labels = torch.full((len(every), width), pad), torch.full((len(every), width), IGNORED)
    for row, (own, learned) in enumerate(every):
        ids[row, : len(own)], labels[row, : len(own)] = own, learned
    return {"input_ids": ids, "labels": labels}
