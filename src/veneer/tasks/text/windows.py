"""Turns rows of text into segments of tokens with labels, and describes the windows that they fill."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from veneer.data.chat import ASSISTANT, examples, templates
from veneer.data.pack import Segment, Window, n_bytes, n_labels, n_tokens, segments
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.data.spread import spread
from veneer.data.tokenizer import Tokenizer
from veneer.data.tokens import Tokens, encode
from veneer.errors import DataError, first_few, option, suggest
from veneer.tasks.base.encoded import Encoded

USUAL = 512  # tokens of a usual window


def check_roles(rows: Sequence[Row], wanted: Sequence[str]) -> None:
    """Raises DataError if no turn of the rows has a role to learn."""
    there = {m["role"] for row in rows if row.kind == "messages" for m in row.columns["messages"]}
    missing = [r for r in wanted if r not in there]
    if missing and (there or tuple(wanted) != ASSISTANT):
        has = suggest(missing[0], there) if there else "; the rows hold no conversation"
        raise DataError(f"{option('train_roles')}: no turn has the role {first_few(map(repr, missing))}{has}")


def encode_row(row: Row, reading: Reading, tokenizer: Tokenizer) -> Encoded:
    """Returns the row's examples as tokens, of any length; a conversation may have several.

    Its whole is the predictions of the longest example. Plain text may be cut anywhere.
    """
    found = examples(
        row,
        tokenizer,
        reading.train_on,
        reading.train_roles,
        which=reading.train_turns,
        special=reading.special_tokens != "spell",
    )
    tokens = [encode(one, tokenizer) for one in found]
    whole = None if row.kind == "text" else max((len(t.ids) - 1 for t in tokens), default=0)
    return Encoded(row, tokens, whole)


def cut(one: Encoded, window: int) -> list[Segment]:
    """Returns the row's segments; prompts and conversations are cut off after `window` predictions."""
    tokens = one.content if one.row.kind == "text" else [t.first(window + 1) for t in one.content]
    found = [s for t in tokens for s in segments(t, window)]
    # Copies: a part of a long text in a stream's buffer must not keep the whole alive.
    return [Segment(*(t.clone() for t in s)) for s in found] if len(found) > 1 else found


def some(kept: Sequence[Encoded], at_most: int, window: int) -> list[Encoded]:
    """Returns evenly spaced rows, and stretches of plain text, about `at_most` usual windows full of them.

    The choice depends on the rows alone, not on the length or packing of windows: figures of runs that differ
    in these are of the same text.
    """
    units = [unit for one in kept for unit in _units(one, window)]
    total = sum(unit.whole or 0 for unit in units)
    full = math.ceil(len(units) * at_most * USUAL / max(1, total))
    return spread(units, max(at_most, full))


def _units(one: Encoded, window: int) -> list[Encoded]:
    if one.row.kind != "text":
        return [one]
    places = [(t, at) for t in one.content for at in range(0, len(t.ids) - 1, USUAL)]
    return [_stretch(one, t, at, window) for t, at in places]


def _stretch(one: Encoded, tokens: Tokens, start: int, window: int) -> Encoded:
    """Returns a usual window's predictions, from `start` on; a longer window adds context without labels."""
    end = min(start + USUAL, len(tokens.ids) - 1)
    first = max(0, min(start, end - window))
    part = Tokens(*(t[first : end + 1] for t in tokens))
    learned = part.learned & (torch.arange(len(part.ids)) > start - first)
    return Encoded(one.row, [part._replace(learned=learned)], end - start)


def is_endless(one: Encoded, tokenizer: Tokenizer, reading: Reading) -> bool:
    """Tells if a conversation has end tokens and learns none: the model would not learn to stop."""
    if one.row.kind != "messages" or "assistant" not in reading.train_roles:
        return False
    end, ids = tokenizer.eos_token_id, [i for t in one.content for i in t.ids.tolist()]
    learned = [i for t in one.content for i in t.ids[t.learned].tolist()]
    return bool(learned) and end in ids and end not in learned


def opening(rows: Iterable[Row], tokenizer: Tokenizer) -> list[str]:
    """Returns a sentence if conversations get the plain template, for lack of one in the tokenizer."""
    if tokenizer.chat_template or not any(row.kind == "messages" for row in rows):
        return []
    return [
        f"the tokenizer has no chat template: conversations are written by {templates.PLAIN!r}, which is"
        " saved"
        " with the adapter; chat_template chooses another one"
    ]


def facts(rows: Sequence[Row], every: Sequence[Segment], windows: Sequence[Window]) -> dict[str, Any]:
    """Returns counts of a text in tokens, and a hash of all inputs and labels."""
    digest = hashlib.sha256()
    for s in every:
        digest.update(s.inputs.numpy().tobytes() + s.labels.numpy().tobytes())
    counts = {
        "tokens": n_tokens(windows),
        "learned_tokens": n_labels(windows),
        "learned_bytes": n_bytes(windows),
    }
    talks = sum(row.kind == "messages" for row in rows)
    own = {"conversations": talks} if talks else {}
    return {"rows": len(rows), **own, "windows": len(windows), **counts, "sha256": digest.hexdigest()}


def as_tensors(windows: Sequence[Sequence[Segment]]) -> dict[str, Tensor]:
    """Returns windows as tensors: fields of all segments end to end (int32), lengths, segments per window."""
    every = [s for w in windows for s in w]
    empty = torch.zeros(0, dtype=torch.int64)
    fields = {name: torch.cat([empty, *(getattr(s, name) for s in every)]).int() for name in Segment._fields}
    return {
        **fields,
        "lengths": torch.tensor([len(s.inputs) for s in every]),
        "sizes": torch.tensor([len(w) for w in windows]),
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Window]:
    """Returns the windows of `as_tensors`."""
    fields = [tensors[name].long().split(tensors["lengths"].tolist()) for name in Segment._fields]
    every = iter([Segment(*one) for one in zip(*fields, strict=True)])
    return [tuple(islice(every, n)) for n in tensors["sizes"].tolist()]
