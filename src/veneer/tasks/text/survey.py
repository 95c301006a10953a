"""Counts tokens of rows as a training would read them, and shows rows token by token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from veneer.data.chat.rendering import specials
from veneer.data.pack import Window, n_labels, n_tokens
from veneer.data.row_files import Row
from veneer.data.tokenizer import Tokenizer
from veneer.data.tokens import Tokens
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.text import windows
from veneer.tasks.text.preview import pieces


def figures(every: Sequence[Encoded], window: int) -> dict[str, Any]:
    """Returns counts of the rows of a part."""
    found = [t for one in every for t in one.content or ()]
    lengths = sorted(len(t.ids) for t in found) or [0]
    contents = [_content(one.content) for one in every if one.content]
    return {
        "rows": len(every),
        "examples": len(found),
        "tokens": sum(lengths),
        "learned": sum(int(t.learned[1:].sum()) for t in found),
        "length": {"least": lengths[0], "median": median(lengths), "most": lengths[-1]},
        "lengths": histogram(lengths),
        "duplicates": len(contents) - len(set(contents)),
        "too_long": sum(one.whole is not None and one.whole > window for one in every),
        "unlabelled": sum(one.content is None or not windows.cut(one, window) for one in every),
    }


def histogram(lengths: Sequence[int]) -> dict[int, int]:
    """Counts lengths up to 8, 16, 32, .. and above half of that, from the first such bound to the last."""
    bounds = [max(8, 1 << (n - 1).bit_length()) for n in lengths]
    first, last = min(bounds).bit_length(), max(bounds).bit_length()
    return {1 << (b - 1): bounds.count(1 << (b - 1)) for b in range(first, last + 1)}


def _content(own: Sequence[Tokens]) -> bytes:
    return b"".join(t.ids.numpy().tobytes() + t.learned.numpy().tobytes() for t in own)


def epoch(found: Sequence[Window], window: int, per_step: int) -> dict[str, Any]:
    """Returns counts of one pass over the windows."""
    n = n_tokens(found)
    return {
        "length": window,
        "tokens": n,
        "learned": n_labels(found),
        "windows": len(found),
        "filled": n / (len(found) * window) if found else 0.0,
        "steps": math.ceil(len(found) / per_step),
    }


def entries(
    one: Encoded, window: int, tokenizer: Tokenizer, words: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Returns the row's examples token by token. words: of the examples, "example 1 of 2" unless given.

    Each is {where, kind, length, learned, special, spelt, too_long, tokens}.
    """
    own, where = one.content or [], one.row.where
    words = words or [f"example {i} of {len(own)}" for i in range(1, len(own) + 1)]
    names = [f"{where}, {word}" for word in words]
    names = names if len(own) > 1 else [where]
    return [_entry(name, one.row, found, window, tokenizer) for name, found in zip(names, own, strict=False)]


def _entry(where: str, row: Row, found: Tokens, window: int, tokenizer: Tokenizer) -> dict[str, Any]:
    ids, learned = found.ids.tolist(), [False, *found.learned.tolist()[1:]]
    each = zip(ids, pieces(ids, tokenizer), learned, strict=True)
    return {
        "where": where,
        "kind": row.kind,
        "length": len(ids),
        "learned": sum(learned),
        **_special(ids, tokenizer),
        "too_long": row.kind != "text" and len(ids) - 1 > window,
        "tokens": [{"id": i, "text": text, "learned": is_learned} for i, text, is_learned in each],
    }


def _special(ids: Sequence[int], tokenizer: Tokenizer) -> dict[str, dict[str, int]]:
    """Returns how often each special token occurs, and how often its name is only spelt out."""
    names = specials(tokenizer)
    spoken = Counter(names.findall(tokenizer.decode(ids)) if names else ())
    every = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    there = Counter({name: ids.count(i) for name, i in every})
    return {"special": dict(+there), "spelt": dict(spoken - there)}
