"""Finds rows that spell the names of special tokens, and says how they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from veneer.data.chat.rendering import specials
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.data.tokenizer import Tokenizer
from veneer.errors import DataError, first_few, option

READ = {"parse": ("read as these tokens", "spell"), "spell": ("spelt out", "parse")}


def opening(rows: Mapping[str, Sequence[Row]], reading: Reading, tokenizer: Tokenizer) -> list[str]:
    """Returns a sentence for every part with rows that spell special tokens.

    Raises one DataError for all parts if the setting refuses such rows.
    """
    found = {part: said for part, some in rows.items() if (said := _found(some, reading, tokenizer))}
    if reading.special_tokens == "refuse":
        if found:
            advice = f"remove them, or set {option('special_tokens')} to parse or spell"
            raise DataError(
                "\n".join(f"{part}: {are}: {where}; {advice}" for part, (are, where) in found.items())
            )
        return []
    how, other = READ[reading.special_tokens]
    change = f"special_tokens={other!r} changes that"
    return [f"{part}: {are}, which are {how}; {change}: {where}" for part, (are, where) in found.items()]


def _found(rows: Sequence[Row], reading: Reading, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """Returns how many rows spell which names, and where."""
    names = specials(tokenizer)
    if names is None:
        return None
    spelt = {row.where: {h for text in _texts(row, reading) for h in names.findall(text)} for row in rows}
    spelt = {where: hits for where, hits in spelt.items() if hits}
    if not spelt:
        return None
    named = first_few(sorted({hit for hits in spelt.values() for hit in hits}), 3)
    return f"{len(spelt)} of {len(rows)} rows spell special tokens ({named})", first_few(spelt, 3)


def _texts(row: Row, reading: Reading) -> Iterator[str]:
    """Yields the texts of a row that the setting decides on; messages only where names are refused."""
    if row.kind in ("text", "pair"):
        every = (row.columns.get(name) for name in ("text", "prompt", "completion"))
        yield from (text for text in every if isinstance(text, str))
    elif row.kind == "messages" and reading.special_tokens == "refuse":
        yield from (m["content"] for m in row.columns["messages"] if m.get("content"))
