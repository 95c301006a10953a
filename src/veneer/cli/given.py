"""Turns the flags of one command line into settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, get_args, get_origin

from veneer import settings
from veneer.cli.flags import KINDS, OPTIMISER, Flag, is_names, is_number_or_word, of_optional, word
from veneer.errors import ConfigError

PLAIN_NAMES = re.compile(r"[\w.,]+")


def values(flags: Iterable[Flag], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings given, options under the setting that holds them. Raises ConfigError for a bad
    NAME=VALUE.
    """
    found: dict[str, Any] = {}
    for flag in flags:
        value = given.get(flag.name)
        if value is None or value in ([], ()):
            continue
        into = found.setdefault(flag.into, {}) if flag.into else found
        into[flag.key or flag.name] = _value(flag, value)
    return found


def check_optimiser(flags: Iterable[Flag], given: Mapping[str, Any], chosen: str) -> None:
    """Raises ConfigError for options of another optimiser than the chosen one."""
    problems = []
    for flag in flags:
        if flag.into == OPTIMISER and given.get(flag.name) is not None and chosen not in flag.owners:
            owner = flag.owners[0]
            wrong = f"{word(flag.name)} is an option of optimiser {owner!r}, but the optimiser is {chosen!r}"
            problems.append(f"{wrong}; use --optimiser {owner} or leave it out")
    if problems:
        raise ConfigError("\n".join(problems))


def _value(flag: Flag, value: Any) -> Any:
    hint = of_optional(flag.hint)
    if get_origin(hint) is dict:
        kind = get_args(hint)[1]
        entries = [e for entry in value for e in (_listed(entry) if kind is str else [entry])]
        return dict(_pair(flag.name, entry, kind) for entry in entries)
    if is_number_or_word(hint):
        return int(value) if re.fullmatch(r"-?\d+", value) else value
    if is_names(hint):
        return names(value)
    return tuple(value) if isinstance(value, list) else value


def names(entries: list[str]) -> str | tuple[str, ...]:
    """Returns layers for `to`: "all-linear" or an expression unchanged, names (with commas, or one) as a
    tuple.
    """
    if len(entries) == 1 and not PLAIN_NAMES.fullmatch(entries[0]):
        return entries[0]
    return tuple(
        name
        for entry in entries
        for name in (entry.split(",") if PLAIN_NAMES.fullmatch(entry) else [entry])
        if name
    )


def _listed(entry: str) -> list[str]:
    """Returns a=b,c=d as two entries; an entry whose commas stand inside a value is kept whole."""
    parts = entry.split(",")
    return parts if all("=" in part for part in parts) else [entry]


def _pair(flag: str, entry: str, kind: Any) -> tuple[str, Any]:
    name, equals, value = entry.rpartition("=")
    try:
        if not equals:
            raise ValueError
        return name, _read(value, kind)
    except ValueError:
        raise ConfigError(
            f"{word(flag)} must be NAME=VALUE with {settings.describe(kind)} as value, such as q_proj=4,"
            f" got {entry!r}"
        ) from None


def _read(text: str, kind: Any) -> Any:
    """Returns the text as the first type of `kind` (int, or float | str) that fits. Raises ValueError."""
    *first, last = get_args(kind) or (kind,)
    for one in first:
        with suppress(ValueError):
            return one(text)
    return last(text)


def over(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a file's settings with the command line's in their place, options one by one."""
    merged = {**file, **given}
    for name in KINDS:
        if isinstance(file.get(name), Mapping) and name in given:
            merged[name] = {**file[name], **given[name]}
    return merged


def share(name: str, text: str) -> float:
    """Returns 0.01 for 1% and for 0.01. Raises ConfigError for anything else."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ConfigError(f"{word(name)} must be a share such as 1%, got {text!r}") from None
