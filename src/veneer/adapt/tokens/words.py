"""Adds tokens to a tokenizer, after checks that it can hold them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from veneer.errors import ConfigError


def enter(tokenizer: Any, tokens: Sequence[str]) -> dict[str, int]:
    """Adds tokens to the tokenizer and returns their ids. Raises ConfigError, before it changes, listing all
    that cannot be added."""
    refuse(list(problems(tokenizer, tokens)))
    return put(tokenizer, tokens)


def problems(tokenizer: Any, tokens: Sequence[str]) -> Iterator[str]:
    """Yields a sentence for every token that cannot be added, or for a tokenizer that cannot grow."""
    known = tokenizer.get_vocab()
    wrong = [*spelling(tokens)]
    wrong += [
        f"tokens must be new, got {t!r}, which has the id {known[t]}; leave it out"
        for t in dict.fromkeys(tokens)
        if t in known
    ]
    yield from wrong or _growing(tokenizer, tokens)


def spelling(tokens: Sequence[str]) -> Iterator[str]:
    """Yields a sentence for every fault of the tokens that no tokenizer is needed to see."""
    if not tokens:
        yield "tokens must hold at least one token, got none"
    empty = [t for t in tokens if not t.strip()]
    if empty:
        yield f"tokens must not be empty, got {empty[0]!r}; leave it out"
    twice = [(t, n) for t, n in Counter(tokens).items() if n > 1 and t not in empty]
    yield from (f"tokens must differ, got {t!r} {n} times" for t, n in twice)


def refuse(found: Sequence[str]) -> None:
    """Raises one ConfigError for all problems."""
    if found:
        raise ConfigError("\n".join(f"add_tokens: {p}" for p in found))


def _growing(tokenizer: Any, tokens: Sequence[str]) -> Iterator[str]:
    """Tries the tokens on a copy of the tokenizer."""
    name = type(tokenizer).__name__
    try:
        trial = copy.deepcopy(tokenizer)
        ids = put(trial, tokens)
    except Exception as e:  # every tokenizer has its own way to refuse
        yield f"tokenizer must take new tokens, got a {name}, which refuses ({type(e).__name__}: {e})"
        return
    lost = [t for t, i in ids.items() if trial.encode(t, add_special_tokens=False) != [i]]
    if lost:
        yield f"tokenizer must read {lost[0]!r} as one token, and a {name} does not; use another token"


def put(tokenizer: Any, tokens: Sequence[str]) -> dict[str, int]:
    """Adds tokens without a check and returns their ids."""
    tokenizer.add_tokens(list(tokens))
    known: Mapping[str, int] = tokenizer.get_vocab()
    return {t: int(known[t]) for t in tokens}
