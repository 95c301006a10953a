"""Settings declared once, as fields of a dataclass: their table, and values from YAML or a command line checked against it."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from veneer.errors import ConfigError, suggest

T = TypeVar("T")
REQUIRED = object()  # the default of a setting that must be given


class Setting(NamedTuple):
    """One row of the table: what flags, files and documentation are made from."""

    name: str
    hint: Any
    default: Any
    help: str
    unit: str


def setting(default: Any, help: str, *, unit: str = "") -> Any:
    """A field of a dataclass with its help text and the unit of its value."""
    return (
        field(metadata=about(help, unit))
        if default is REQUIRED
        else field(default=default, metadata=about(help, unit))
    )


def about(help: str, unit: str = "") -> dict[str, str]:
    """The metadata of a field, for fields whose default is made anew for every object."""
    return {"help": help, "unit": unit}


def table(kind: type) -> dict[str, Setting]:
    """The settings of a dataclass by name, in its order."""
    hints = get_type_hints(kind)
    return {
        f.name: Setting(f.name, hints[f.name], _default(f), f.metadata["help"], f.metadata["unit"])
        for f in fields(kind)
    }


def _default(f: Field[Any]) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else REQUIRED


def from_dict(kind: type[T], values: Mapping[str, Any], inside: Mapping[str, Iterable[str]]) -> T:
    """An object of the dataclass. Raises one ConfigError for all unknown, missing and unsuitable settings.

    inside: names that belong into a setting of their own, as {"options": ["rank", ..]}, for the advice on unknown ones.
    """
    known = table(kind)
    problems = [
        f"unknown setting {name!r}{_place(str(name), known, inside)}" for name in values if name not in known
    ]
    problems += [
        f"setting {s.name!r} is missing: {s.help}"
        for s in known.values()
        if s.default is REQUIRED and s.name not in values
    ]
    given = {}
    for name, value in values.items():
        if name in known:
            try:
                given[name] = suit(value, known[name].hint)
            except ValueError as e:
                problems.append(f"{name}: {e}")
    if problems:
        raise ConfigError("\n".join(problems))
    return kind(**given)


def _place(name: str, known: Iterable[str], inside: Mapping[str, Iterable[str]]) -> str:
    owner = next((setting for setting, names in inside.items() if name in names), None)
    if owner:
        return f"; it belongs into {owner}, as  {owner}: {{{name}: ..}}"
    return suggest(name, [*known, *(n for names in inside.values() for n in names)])


def suit(value: Any, hint: Any) -> Any:
    """The value as `hint` wants it: lists become tuples, whole numbers floats. Raises ValueError where it does not fit."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _suit_any(value, inner, hint)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{value!r} is none of {', '.join(map(str, inner))}{_near(value, inner)}")
        return value
    if origin is tuple:
        return _suit_tuple(value, inner)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{value!r} is not a table of names and values")
        return {suit(k, inner[0]): suit(v, inner[1]) for k, v in value.items()}
    return _suit_plain(value, hint)


def _suit_any(value: Any, hints: Sequence[Any], whole: Any) -> Any:
    for hint in hints:
        try:
            return suit(value, hint)
        except ValueError as e:
            last = e
    if len([h for h in hints if h is not type(None)]) == 1:
        raise next(_reason(value, h) for h in hints if h is not type(None))
    raise ValueError(f"{value!r} is not {describe(whole)}") from last


def _reason(value: Any, hint: Any) -> ValueError:
    try:
        suit(value, hint)
    except ValueError as e:
        return e
    raise AssertionError


def _suit_tuple(value: Any, inner: Sequence[Any]) -> tuple[Any, ...]:
    many = len(inner) == 2 and inner[1] is Ellipsis
    if isinstance(value, str) and many and inner[0] is str:
        return (value,)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{value!r} is not a list")
    if not many and len(value) != len(inner):
        raise ValueError(f"{list(value)!r} has {len(value)} values, not {len(inner)}")
    return tuple(
        suit(v, inner[0] if many else h)
        for v, h in zip(value, inner if not many else [None] * len(value), strict=True)
    )


def _suit_plain(value: Any, hint: Any) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{value!r} is not {describe(hint)}")
    return value


def _near(value: Any, names: Sequence[Any]) -> str:
    hint = suggest(str(value), map(str, names))
    return hint if hint.startswith("; did") else ""


NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "nothing",
    Any: "a value",
}


def describe(hint: Any) -> str:
    """A type in words for people: "a number or nothing", "a list of texts"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(h) for h in inner)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple:
        return (
            f"a list of {describe(inner[0])}"
            if inner[-1] is Ellipsis
            else f"{len(inner)} times {describe(inner[0])}"
        )
    if origin is dict:
        return f"a table of {describe(inner[1])}"
    return NAMES.get(hint, str(hint))


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """YAML settings as a dict, with 1e-5 a number (YAML 1.1 has it as text) and a key given twice refused.

    Raises ConfigError with the place of what is not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(k, deep=True) for k, _ in node.value]
            twice = sorted({str(k) for k in keys if keys.count(k) > 1})
            if twice:
                raise ConfigError(f"{where}: given twice: {', '.join(twice)}")
            return super().construct_mapping(node, deep)  # type: ignore[no-any-return, unused-ignore]

    number = re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        found = yaml.load(text, Loader)
    except yaml.YAMLError as e:
        raise ConfigError(f"{where} is not YAML: {e}") from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{where} holds {'nothing' if found is None else repr(found)[:40]}; write one setting a line, e.g.  lr: 1e-3"
        )
    return found
