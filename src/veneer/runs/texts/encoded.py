"""Turns rows into tokens, and leaves out rows that are too long or have nothing to learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from veneer.data.chat import examples
from veneer.data.forms.columns import EMPTY
from veneer.data.pack import Segment, segments
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.data.tokens import Tokens, encode
from veneer.errors import DataError, first_few
from veneer.train.loop.progress import Voice

LEFT_OUT = ("overlong", "empty")
SHARE = 0.1  # of the rows of a part: leaving out more is an error


class Encoded(NamedTuple):
    """A row and the tokens of its examples."""

    row: Row
    examples: list[Tokens]

    @property
    def whole(self) -> int | None:
        """Returns the predictions of the longest example; None for a text, which may be cut into windows."""
        return None if self.row.kind == "text" else max((len(t.ids) - 1 for t in self.examples), default=0)


class LeftOut(NamedTuple):
    """Names of rows: too long and left out, without anything to learn and left out, and cut."""

    overlong: list[str]
    empty: list[str]
    cut: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """Returns the numbers of rows left out, without zeros."""
        return {name: len(getattr(self, name)) for name in LEFT_OUT if getattr(self, name)}


def encode_rows(rows: Sequence[Row], reading: Reading, tokenizer: Any) -> list[Encoded]:
    """Returns the rows with their tokens; a conversation may have several examples, an empty row zero."""
    return [Encoded(row, [] if row.kind == EMPTY else encode_row(row, reading, tokenizer)) for row in rows]


def encode_row(row: Row, reading: Reading, tokenizer: Any) -> list[Tokens]:
    """Returns the row's examples as tokens."""
    found = examples(row, tokenizer, reading.train_on, reading.train_roles, reading.train_turns)
    return [encode(one, tokenizer) for one in found]


def segments_of(one: Encoded, window: int) -> list[Segment]:
    """Returns the segments of a row; what does not fit into a window is cut off, but for texts."""
    cut = one.examples if one.row.kind == "text" else [t.first(window + 1) for t in one.examples]
    return [s for t in cut for s in segments(t, window)]


def keep(
    encoded: Sequence[Encoded], reading: Reading, part: str, voice: Voice
) -> tuple[list[Encoded], LeftOut]:
    """Returns the rows to use and those left out. Raises DataError if the settings or their number forbid"
    " it."""
    window, found = reading.window, LeftOut([], [], [])
    kept = []
    for one in encoded:
        why = verdict(one, reading)
        if why:
            getattr(found, why).append(one.row.where)
        if why not in LEFT_OUT:
            kept.append(one)
    lengths = {one.row.where: one.whole or 0 for one in encoded}
    _check_overlong(found, lengths, reading, part)
    _check_empty(found.empty, len(encoded), reading, part)
    for why, names in found._asdict().items():
        if names:
            rows = f"{len(names)} of {len(encoded)} rows"
            voice.say(f"{part}: {rows} {words(why, window)}: {first_few(names, 3)}")
    return kept, found


def verdict(one: Encoded, reading: Reading) -> str:
    """Returns the name of the field of LeftOut that the row belongs to, or an empty string."""
    window, whole = reading.window, one.whole
    long = whole is not None and whole > window
    if not segments_of(one, whole or window if long else window):
        return "empty"
    if not long:
        return ""
    # A row whose whole answer would be cut away is left out.
    return "cut" if reading.overlong == "cut" and segments_of(one, window) else "overlong"


def words(why: str, window: int) -> str:
    """Returns the words for what happens to rows of a field of LeftOut."""
    if why == "empty":
        return "have nothing to learn and are left out"
    return f"are longer than length={window} tokens and {'cut' if why == 'cut' else 'left out'}"


def _check_overlong(found: LeftOut, lengths: dict[str, int], reading: Reading, part: str) -> None:
    long, cuts = found.overlong, reading.overlong == "cut"
    if not long:
        return
    most, named = max(lengths[where] for where in long), first_few(f"{w} ({lengths[w]})" for w in long)
    are = "have their whole answer beyond" if cuts else "are longer than"
    rows = f"{part}: {len(long)} of {len(lengths)} rows {are} length={reading.window} tokens: {named}"
    if reading.overlong == "error":
        raise DataError(f"{rows}; use length={most}, shorten them, or set overlong to drop or cut")
    if len(long) > SHARE * len(lengths):
        cut = "" if cuts else ", set overlong='cut'"
        raise DataError(
            f"{rows}; at most {SHARE:.0%} may be left out: use length={most}{cut}, or shorten them"
        )


def _check_empty(names: Sequence[str], total: int, reading: Reading, part: str) -> None:
    if names and (reading.empty == "error" or len(names) > SHARE * total):
        limit = "" if reading.empty == "error" else f"at most {SHARE:.0%} may be left out: "
        drop = ", or set empty='drop'" if reading.empty == "error" else ""
        raise DataError(
            f"{part}: {len(names)} of {total} rows have nothing to learn (every label is masked):"
            f" {first_few(names)};"
            f" {limit}give them a completion{',' if drop else ' or'} use train_on='all'{drop}"
        )


def is_endless(one: Encoded, tokenizer: Any, reading: Reading) -> bool:
    """Tells if a conversation has end tokens and learns none of them, so that the model would not learn"
    " to stop."""
    if one.row.kind != "messages" or "assistant" not in reading.train_roles:
        return False
    end, ids = tokenizer.eos_token_id, [i for t in one.examples for i in t.ids.tolist()]
    learned = [i for t in one.examples for i in t.ids[t.learned].tolist()]
    return bool(learned) and end in ids and end not in learned
