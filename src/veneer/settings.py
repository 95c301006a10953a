"""Reads tables of settings from dataclass fields, and checks values from YAML or a command line."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from veneer import foreign
from veneer.errors import ConfigError, option, suggest

T = TypeVar("T")
REQUIRED = object()  # the default of a setting that must be given


class Setting(NamedTuple):
    """One row of the table, from which flags, files and documentation are made."""

    name: str
    hint: Any
    default: Any
    help: str
    unit: str
    panel: str = ""  # title of the group that it is shown in


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of settings that belong together; a larger set inherits from its parts, so that it stays flat.

    On creation every value is fitted to its type. Raises one ConfigError for all unsuitable values, or
    else for all `problems`.
    """

    PANEL: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints, wrong = get_type_hints(type(self)), []
        for f in fields(self):
            try:
                object.__setattr__(self, f.name, suit(getattr(self, f.name), hints[f.name]))
            except ValueError as e:
                wrong.append(f"{option(f.name)} {e}")
        wrong = wrong or list(self.problems())
        if wrong:
            raise ConfigError("\n".join(wrong))

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range or contradiction."""
        yield from ()


def setting(default: Any, help: str, *, unit: str = "") -> Any:
    """Returns a dataclass field with its help text and the unit of its value."""
    words = about(help, unit)
    return field(metadata=words) if default is REQUIRED else field(default=default, metadata=words)


def about(help: str, unit: str = "") -> dict[str, str]:
    """Returns the metadata of a field, for fields whose default is made anew for every object."""
    return {"help": help, "unit": unit}


def table(kind: type) -> dict[str, Setting]:
    """Returns the settings of a dataclass by name, in order."""
    hints = get_type_hints(kind)
    return {
        f.name: Setting(
            f.name, hints[f.name], _default(f), f.metadata["help"], f.metadata["unit"], _panel(kind, f.name)
        )
        for f in fields(kind)
    }


def _default(f: Field[Any]) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else REQUIRED


def _panel(kind: type, name: str) -> str:
    """Returns the panel of the class that declares the field."""
    owner = next((k for k in kind.__mro__ if name in vars(k).get("__annotations__", {})), kind)
    return str(getattr(owner, "PANEL", ""))


class Range(NamedTuple):
    """The range that the settings `names` must be in, in words and as bounds; open: `least` is excluded."""

    words: str
    names: tuple[str, ...]
    least: float
    most: float = float("inf")
    open: bool = False
    advice: str = ""

    def problems(self, values: object) -> Iterator[str]:
        """Yields a sentence for every attribute of `values` that is out of range; None is in every range."""
        for name in self.names:
            value = getattr(values, name)
            low = value is not None and (value < self.least or (self.open and value == self.least))
            if low or (value is not None and not value < self.most):
                yield f"{option(name)} must be {self.words}, got {value:g}{self.advice and '; '}{self.advice}"


def from_dict(kind: type[T], values: Mapping[str, Any], inside: Mapping[str, Iterable[str]]) -> T:
    """Returns an object of the dataclass; raises one ConfigError for all unsuitable settings.

    inside: names that belong inside another setting, as {"options": ["rank", ..]}, for advice.
    """
    known = table(kind)
    problems = [
        f"unknown setting {name!r}{_place(str(name), known, inside)}" for name in values if name not in known
    ]
    problems += [
        f"{option(s.name)} must be given: {s.help}"
        for s in known.values()
        if s.default is REQUIRED and s.name not in values
    ]
    given = {}
    for name, value in values.items():
        if name in known:
            try:
                given[name] = suit(value, known[name].hint)
            except ValueError as e:
                problems.append(f"{option(name)} {e}")
    if problems:
        raise ConfigError("\n".join(problems))
    return kind(**given)


def _place(name: str, known: Iterable[str], inside: Mapping[str, Iterable[str]]) -> str:
    owner = next((setting for setting, names in inside.items() if name in names), None)
    if owner:
        return f"; put it inside {owner}, as  {owner}: {{{name}: ..}}"
    return suggest(name, [*known, *(n for names in inside.values() for n in names)])


def suit(value: Any, hint: Any) -> Any:
    """Returns the value as type `hint`: lists become tuples, whole numbers floats.

    Raises ValueError, as "must be .., got ..", for a value that cannot be one.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _suit_any(value, inner, hint)
    if origin is Literal:
        if value not in inner:
            raise ValueError(
                f"must be {describe(hint)}, got {value!r}{suggest(str(value), map(str, inner), listed=False)}"
            )
        return value
    if origin is tuple:
        return _suit_tuple(value, inner)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"must be a table of names and values, got {value!r}")
        return {suit(k, inner[0]): suit(v, inner[1]) for k, v in value.items()}
    return _suit_plain(value, hint)


def _suit_any(value: Any, hints: Sequence[Any], whole: Any) -> Any:
    given = [h for h in hints if h is not type(None)]
    if value is None and len(given) < len(hints):
        return None
    reasons = []
    for hint in given:
        try:
            return suit(value, hint)
        except ValueError as e:
            reasons.append(e)
    raise reasons[0] if len(given) == 1 else ValueError(f"must be {describe(whole)}, got {value!r}")


def _suit_tuple(value: Any, inner: Sequence[Any]) -> tuple[Any, ...]:
    many = len(inner) == 2 and inner[1] is Ellipsis
    if isinstance(value, str) and many and inner[0] is str:
        return (value,)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"must be a list, got {value!r}")
    if not many and len(value) != len(inner):
        raise ValueError(f"must have {len(inner)} values, got {len(value)}: {list(value)!r}")
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
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not fits or (isinstance(value, float) and not abs(value) < float("inf")):
        raise ValueError(f"must be {describe(hint)}, got {value!r}")
    return value


NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "a value"}


def describe(hint: Any) -> str:
    """Returns a type in words: "a number or nothing", "a list of texts"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("nothing" if h is type(None) else describe(h) for h in inner)
    if origin is Literal:
        *names, last = map(repr, inner)
        return f"{', '.join(names)} or {last}" if names else last
    if origin is tuple:
        many = inner[-1] is Ellipsis
        return f"a list of {describe(inner[0])}" if many else f"{len(inner)} times {describe(inner[0])}"
    if origin is dict:
        return f"a table of {describe(inner[1])}"
    return NAMES.get(hint, str(hint))


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Returns YAML settings as a dict; 1e-5 is a number, which YAML 1.1 reads as text.

    Raises ConfigError, naming the place, for text that is not YAML and for a key given twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            own = (k for k, _ in node.value if not k.tag.endswith(":merge"))  # "<<": keys of others
            keys = [str(self.construct_object(k, deep=True)) for k in own]
            if twice := sorted({k for k in keys if keys.count(k) > 1}):
                raise ConfigError(f"{where}: given twice: {', '.join(twice)}; keep one of each")
            return super().construct_mapping(node, deep)  # type: ignore[no-any-return, unused-ignore]

    number, starts = re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, starts)
    try:
        found = foreign.yaml_of(text, Loader)
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{where} is not YAML: {e}") from None
    if not isinstance(found, dict):
        held = "nothing" if found is None else repr(found)[:40]
        raise ConfigError(f"{where} must hold settings, got {held}; write one a line, e.g.  lr: 1e-3")
    return found
