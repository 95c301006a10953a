"""Matches names of layers with the patterns of to= and exclude=."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from veneer import foreign
from veneer.errors import SiteError, first_few, suggest
from veneer.sites.finding.kinds import kind_of

Target = str | Sequence[str]


def by_name(layers: dict[str, nn.Module], to: Target) -> list[str]:
    """Returns the layers whose whole names match an expression, or end with an entry of a list.

    Raises SiteError for a malformed expression, and for an entry that matches nothing.
    """
    if isinstance(to, str):
        return _by_expression(layers, to)
    found = {entry: [n for n in layers if ends(n, entry)] for entry in to}
    missing = [entry for entry, names in found.items() if not names]
    if missing:
        endings = {n.rsplit(".", 1)[-1] for n, m in layers.items() if kind_of(m)}
        raise SiteError(
            "\n".join(f"no layer is called {entry!r}{suggest(entry, endings)}" for entry in missing)
        )
    chosen = {n for names in found.values() for n in names}
    return [n for n in layers if n in chosen]


def _by_expression(layers: dict[str, nn.Module], expression: str) -> list[str]:
    pattern = _compiled("to", expression)
    foreign.check_expressions([expression], layers, "to")
    names = [n for n, m in layers.items() if pattern.fullmatch(n) and kind_of(m)]
    if not names:
        some = first_few([n for n, m in layers.items() if kind_of(m)], 3)
        raise SiteError(f"no layer matches to={expression!r}; the model has e.g. {some}")
    return names


def ends(name: str, entry: str) -> bool:
    """Returns True if the name equals the entry, or ends with it after a dot."""
    return name == entry or name.endswith(f".{entry}")


def meant(name: str, target: Target) -> bool:
    """Returns True if an expression matches the whole name, or an entry of a list ends it.

    Raises SiteError for a malformed expression.
    """
    if isinstance(target, str):
        return _compiled("to", target).fullmatch(name) is not None
    return any(ends(name, entry) for entry in target)


def excluded(name: str, exclude: Target) -> bool:
    """Returns True if `exclude` means the layer, or a module that it is inside of."""
    return any(meant(owner, exclude) for owner in _upwards(name))


def check_exclude(names: Sequence[str], exclude: Target) -> None:
    """Raises SiteError if `exclude` is malformed, or an entry of it leaves out none of the names."""
    if isinstance(exclude, str):
        _compiled("exclude", exclude)
        foreign.check_expressions([exclude], [owner for n in names for owner in _upwards(n)], "exclude")
    entries: list[Target] = [exclude] if isinstance(exclude, str) else [[entry] for entry in exclude]
    idle = [e if isinstance(e, str) else e[0] for e in entries if not any(excluded(n, e) for n in names)]
    if idle:
        endings = {n.rsplit(".", 1)[-1] for n in names}
        raise SiteError(
            "\n".join(f"exclude={entry!r} leaves out no layer{suggest(entry, endings)}" for entry in idle)
        )


def _upwards(name: str) -> Iterator[str]:
    """Yields "a.b.c", "a.b" and "a"."""
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def _compiled(setting: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as e:
        raise SiteError(f"{setting}={expression!r} is not a regular expression: {e}") from None
