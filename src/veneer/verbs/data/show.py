"""`veneer data show`: rows as the model reads them, token by token, with what is learned of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.data.tokens import Tokens
from veneer.errors import ConfigError
from veneer.runs.texts import decided, texts
from veneer.runs.texts.encoded import Encoded, encode_rows
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

BACK = 4  # tokens that are decoded before one, as a token's text may depend on those before it
MOST = 3  # bytes of a character that do not end it


def show(run: Run, rows: int = 3) -> dict[str, Any]:
    """Returns the first rows of the training text, token by token.

    {"shown": rows, "of": all rows, "rows": [{where, kind, length, learned, too_long, tokens: [{id, text,
    learned}]}], "notes": [..]}; a conversation with several examples has an entry for each. The first token
    has no label. Raises the errors of unreadable texts.
    """
    if rows < 1:
        raise ConfigError(f"rows {rows} must be 1 or more")
    run = texts.named(run)
    voice = Voice(False)
    gathered = texts.gather(run, voice)
    tokenizer = decided.tokenizer_of(run, voice)
    decided.say_template(gathered, tokenizer, voice)
    found = gathered["train"]
    run = decided.with_length(run, encode_rows(found, run, tokenizer), voice)
    shown = encode_rows(found[:rows], run, tokenizer)
    return {
        "model": run.model,
        "length": run.window,
        "shown": len(shown),
        "of": len(found),
        "rows": [entry for one in shown for entry in _entries(one, run, tokenizer)],
        "notes": voice.said,
    }


def _entries(one: Encoded, run: Run, tokenizer: Any) -> list[dict[str, Any]]:
    row, own = one
    names = (
        [row.where]
        if len(own) == 1
        else [f"{row.where}, example {i} of {len(own)}" for i in range(1, len(own) + 1)]
    )
    return [_entry(where, row.kind, found, run, tokenizer) for where, found in zip(names, own, strict=True)]


def _entry(where: str, kind: str, found: Tokens, run: Run, tokenizer: Any) -> dict[str, Any]:
    ids, learned = found.ids.tolist(), [False, *found.learned.tolist()[1:]]
    each = zip(ids, pieces(ids, tokenizer), learned, strict=True)
    return {
        "where": where,
        "kind": kind,
        "length": len(ids),
        "learned": sum(learned),
        "too_long": kind != "text" and len(ids) - 1 > run.window,
        "tokens": [{"id": i, "text": text, "learned": is_learned} for i, text, is_learned in each],
    }


def pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Returns the text that each token adds; of a character made of several tokens, the last one adds it."""
    found: list[str] = []
    ends = [0]  # places where no character is open
    for i in range(len(ids)):
        begin = next((e for e in reversed(ends) if e <= ends[-1] - BACK), 0)
        before, now = (
            tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False) for end in (ends[-1], i + 1)
        )
        if now.endswith("\ufffd") and i + 1 < len(ids) and i - ends[-1] < MOST:
            found.append("")
        else:
            found.append(now[len(before) :] if now.startswith(before) else tokenizer.decode([ids[i]]))
            ends.append(i + 1)
    return found
