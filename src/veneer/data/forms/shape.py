"""Renames the columns of a row, and writes its prompt from several of them, before its form is looked for."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from veneer.data.forms.media import Media
from veneer.data.forms.messages import opened
from veneer.errors import DataError, first_few, option

# The columns that a kind of example is made of.
TARGETS = (
    "text", "prompt", "completion", "messages", "tools", "conversations", "system", "instruction", "input",
    "output", "history",
)  # fmt: skip
# Those of tasks with rows of their own.
OF_TASKS = ("label", "chosen", "rejected")
TALKS = ("conversations", "chosen", "rejected")  # hold turns whose keys may have other names


class Shape(NamedTuple):
    """columns: {target: column}, where a.b and a.0 look inside a column; template: a prompt with {column} in
    it.

    A shape with columns or a template leaves all other columns unused. tags: other names for the keys and
    speakers of conversations, as {"from": .., "value": .., "human": .., "gpt": ..}. forms: columns of
    a task's own kinds of row, in place of those of text. media: the layout of a folder of pictures or clips.
    """

    columns: Mapping[str, str] = {}
    template: str = ""
    tags: Mapping[str, str] = {}
    forms: Mapping[str, tuple[str, ...]] = {}
    media: Media | None = None

    @property
    def reads_text(self) -> bool:
        """Tells if a plain text is a row."""
        return not self.forms or "text" in self.forms

    @property
    def wanted(self) -> str:
        """Returns the columns of a task's own kinds of row, in words."""
        return " or ".join(" and ".join(names) for names in self.forms.values())

    @property
    def is_given(self) -> bool:
        """Tells if the user said what to learn, so that nothing has to be refused by name."""
        return bool(self.columns or self.template)

    def applied(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the row's columns in this shape. Raises DataError for a column that the row lacks."""
        if not self.is_given:
            return dict(row)
        found = {target: as_text(at(row, path)) for target, path in self.columns.items()}
        if self.template:
            found["prompt"] = self._filled(row)
            if "completion" not in found:
                found["completion"] = as_text(at(row, "completion"))
        for name in TALKS if self.tags else ():
            turns = opened(found.get(name))
            if isinstance(turns, list):
                found[name] = [self._renamed(turn) for turn in turns]
            elif isinstance(turns, dict):
                found[name] = self._renamed(turns)
        unused = {name: row[name] for name in row if name not in self._read}
        return {**{name: value for name, value in unused.items() if name not in TARGETS}, **found}

    def _renamed(self, turn: Any) -> Any:
        """Returns a message with the usual keys and speakers of ShareGPT."""
        keys = {self.tags.get(key, key): key for key in ("from", "value")}
        if not isinstance(turn, dict) or not {*keys} <= {*turn}:
            return turn
        found = {keys.get(key, key): value for key, value in turn.items()}
        speakers = {spoken: name for name, spoken in self.tags.items() if name not in ("from", "value")}
        return {**found, "from": speakers.get(found["from"], found["from"])}

    @property
    def _read(self) -> set[str]:
        paths = [*self.columns.values(), *fields(self.template)]
        return {*paths, *(path.partition(".")[0] for path in paths)}

    def _filled(self, row: Mapping[str, Any]) -> str:
        values = {path: at(row, path) for path in fields(self.template)}
        out = []
        for before, path, _, _ in string.Formatter().parse(self.template):
            out.append(before)
            if path is not None:
                out.append("" if values[path] is None else str(as_text(values[path])))
        return "".join(out)


AS_IS = Shape()


def fields(template: str) -> list[str]:
    """Returns the columns that a template names. Raises ValueError for a template that cannot be parsed."""
    return [path for _, path, _, _ in string.Formatter().parse(template) if path is not None]


def template_of(given: str) -> str:
    """Returns a prompt template from a setting: the text of a file of that name, or the words, with \\n"
    " for a line's end."""
    if len(given) < 256 and Path(given).is_file():
        return Path(given).read_text(encoding="utf-8")
    return given.replace("\\n", "\n").replace("\\t", "\t")


def problems(columns: Mapping[str, str], template: str) -> Iterator[str]:
    """Yields a sentence for every unsuitable setting of a shape."""
    odd = [name for name in columns if name not in (*TARGETS, *OF_TASKS)]
    if odd:
        known, given = ", ".join((*TARGETS, *OF_TASKS)), first_few(map(repr, odd))
        yield f"{option('columns')} must set {known}, got {given}; write NEW=COLUMN"
    if template:
        try:
            named = fields(template)
        except ValueError as e:
            must = "must be text with {column} in it"
            yield f"{option('prompt_template')} {must}: {e}; write a brace as {{{{ or }}}}"
            return
        if not named or not all(re.fullmatch(r"[^\s{}!:\[\]]+", path) for path in named):
            yield f"{option('prompt_template')} must name columns as {{column}}, got {template!r}"
        if "prompt" in columns:
            yield f"{option('prompt_template')} writes the prompt, so {option('columns')} cannot set it too"


def at(row: Mapping[str, Any], path: str) -> Any:
    """Returns the value of a column, or of a place inside it: answers.text.0. Raises DataError if it is"
    " missing."""
    if path in row:
        return row[path]
    value: Any = row
    for step in path.split("."):
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (KeyError, IndexError, TypeError, ValueError):
            names = first_few(map(repr, row), 8)
            raise DataError(
                f"column {path!r} (named by columns or prompt_template) is missing, got {names}"
            ) from None
    return value


def as_text(value: Any) -> Any:
    """Returns a number as text, anything else unchanged: a column that is named is wanted as text."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
