"""Command line flags made from declarations: the fields of a settings dataclass, and the options of all methods and optimisers."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import typer
from rich.markup import escape

from veneer import methods, optim, settings
from veneer.errors import ConfigError
from veneer.methods.base.described import helps_of, option_helps
from veneer.train.run import Run

T = TypeVar("T")
METHOD, OPTIMISER = (
    "options",
    "optimiser_options",
)  # settings that hold options, each of which has a flag of its own
OF_THE_RUN = ("seed",)  # options that the setting of this name gives to every method
KINDS = {METHOD: "method", OPTIMISER: "optimiser"}  # whose options these are
PLAIN_NAMES = re.compile(r"[\w.,]+")


class Flag(NamedTuple):
    """One flag: its setting, the type of the setting's value, and what --help says.

    owners: the methods or optimisers whose option it is; into, key: the setting that holds it, and its name there.
    """

    name: str
    hint: Any
    help: str
    metavar: str = ""
    owners: tuple[str, ...] = ()
    required: bool = False
    argument: bool = False  # given by its place, without --name
    into: str = ""
    key: str = ""


def of_settings(kind: type) -> list[Flag]:
    """A flag for every field of a settings dataclass but those that hold options; what is missing is the dataclass's to say."""
    rows = settings.table(kind).values()
    return [
        Flag(s.name, s.hint, f"{s.help}{shown_default(s.default)}", s.unit)
        for s in rows
        if s.name not in KINDS
    ]


def of_function(function: Callable[..., Any], without: Collection[str] = ()) -> list[Flag]:
    """A flag for every parameter of a function but `without`, and an argument for what must be given by place."""
    parameters = inspect.signature(function, eval_str=True).parameters
    helps = helps_of(function, parameters)
    made = []
    for name, p in parameters.items():
        if name not in without:
            required = p.default is p.empty
            text = helps.get(name, "") + ("" if required else shown_default(p.default))
            made.append(
                Flag(
                    name,
                    p.annotation,
                    text,
                    required=required,
                    argument=required and p.kind is p.POSITIONAL_OR_KEYWORD,
                )
            )
    return made


def of_methods() -> list[Flag]:
    """A flag for every option of any method; one for all methods that share it."""
    found: dict[str, Flag] = {}
    helps: dict[str, dict[str, str]] = {}
    for method in methods.available():
        kind = methods.get(method)
        texts = option_helps(kind)
        for key, p in methods.options_of(kind).items():
            if key in OF_THE_RUN:
                continue
            name = flag_of_method(method, key)
            before = found.setdefault(name, Flag(name, p.annotation, "", into=METHOD, key=key))
            if before.hint != p.annotation:
                raise TypeError(
                    f"option {key!r} of method {method!r} is a {p.annotation}, of {before.owners} a {before.hint}"
                )
            found[name] = before._replace(owners=(*before.owners, method))
            helps.setdefault(name, {})[method] = f"{texts.get(key, '')}{shown_default(p.default)}"
    return [flag._replace(help=_by_owner(helps[name])) for name, flag in found.items()]


def flag_of_method(method: str, option: str) -> str:
    """The flag's name: the option's own, unless a setting of the run has that name."""
    return f"{method}_{option}" if option in settings.table(Run) and option not in OF_THE_RUN else option


def _by_owner(helps: Mapping[str, str]) -> str:
    """What is said of a flag: one text where all owners say the same, else a paragraph for each with its owners."""
    alike: dict[str, list[str]] = {}
    for owner, text in helps.items():
        alike.setdefault(text, []).append(owner)
    return "\n\n".join(
        alike if len(alike) == 1 else (f"{', '.join(owners)}: {text}" for text, owners in alike.items())
    )


def of_optimisers() -> list[Flag]:
    """A flag for every option of every optimiser, with the optimiser's name before it: --loraplus-ratio."""
    made = []
    for name in optim.available():
        known = optim.options_of(name)
        helps = helps_of(optim.get(name).__init__, known)
        for option, p in known.items():
            text = f"{helps.get(option, '')}{shown_default(p.default)}"
            made.append(
                Flag(
                    f"{name}_{option}".replace("-", "_"),
                    p.annotation,
                    text,
                    owners=(name,),
                    into=OPTIMISER,
                    key=option,
                )
            )
    return made


def shown_default(value: Any) -> str:
    """ " (default: 8)", or nothing where the default says nothing."""
    if value is settings.REQUIRED or value is None or value == () or value == {} or value == "":
        return ""
    if isinstance(value, bool):
        return f" (default: {'yes' if value else 'no'})"
    return f" (default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"


def declare(function: Callable[..., T], flags: Iterable[Flag]) -> Callable[..., T]:
    """The function, which takes **given, with the signature from which typer makes these flags after its own parameters.

    None, and no entries, stand for a flag that was not given.
    """
    own = [
        p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    function.__signature__ = inspect.Signature([*own, *map(_parameter, flags)])  # type: ignore[attr-defined]
    return function


def _parameter(flag: Flag) -> inspect.Parameter:
    kind, default = (
        (parsed(flag.hint), inspect.Parameter.empty) if flag.required else (parsed(flag.hint) | None, None)
    )
    return inspect.Parameter(
        flag.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, _info(flag)]
    )


def _info(flag: Flag) -> Any:
    text = escape(flag.help)
    if flag.argument:
        return typer.Argument(metavar=flag.name.upper(), help=text, show_default=False)
    word = f"--{flag.name.replace('_', '-')}"
    return typer.Option(
        f"{word}/--no-{word[2:]}" if flag.hint is bool else word,
        help=text,
        show_default=False,
        metavar=None if flag.hint is bool else f"<{flag.metavar or words(flag.hint)}>",
        rich_help_panel=f"Options of the {KINDS[flag.into]}: {', '.join(flag.owners)}"
        if flag.owners
        else None,
    )


def parsed(hint: Any) -> Any:
    """The type that typer parses for a setting of type `hint`; repeated flags and NAME=VALUE are lists of texts."""
    hint = _of_optional(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if (
        hint in (str, int, float, bool, Path)
        or origin is Literal
        or (origin is tuple and Ellipsis not in inner)
    ):
        return hint
    if origin is dict or inner == (str, ...) or (origin is Sequence and inner == (str,)) or _is_names(hint):
        return list[str]
    raise TypeError(f"no flag can be made for a {hint}")


def words(hint: Any) -> str:
    """What a flag takes, for --help."""
    hint = _of_optional(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is dict:
        return f"name={words(inner[1])}"
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin is tuple and Ellipsis not in inner:
        return " ".join(map(words, inner))
    return {str: "text", int: "integer", float: "number", Path: "path"}.get(hint, "text, repeatable")


def _of_optional(hint: Any) -> Any:
    inner = [h for h in get_args(hint) if h is not type(None)]
    return inner[0] if get_origin(hint) in (Union, types.UnionType) and len(inner) == 1 else hint


def _is_names(hint: Any) -> bool:
    """Whether a setting takes an expression or a list of names: str | tuple[str, ...], or None besides."""
    return get_origin(hint) in (Union, types.UnionType) and set(get_args(hint)) - {type(None)} == {
        str,
        tuple[str, ...],
    }


def values(flags: Iterable[Flag], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the command line gave, options under the setting that holds them. Raises ConfigError for a bad NAME=VALUE."""
    found: dict[str, Any] = {}
    for flag in flags:
        value = given.get(flag.name)
        if value is None or value in ([], ()):
            continue
        into = found.setdefault(flag.into, {}) if flag.into else found
        into[flag.key or flag.name] = _value(flag, value)
    return found


def check_optimiser(flags: Iterable[Flag], given: Mapping[str, Any], chosen: str) -> None:
    """Raises ConfigError for flags that are options of another optimiser than the chosen one."""
    problems = []
    for flag in flags:
        if flag.into == OPTIMISER and given.get(flag.name) is not None and chosen not in flag.owners:
            word, owner = f"--{flag.name.replace('_', '-')}", flag.owners[0]
            what = f"{word} is an option of optimiser {owner!r}, but the optimiser is {chosen!r}"
            problems.append(f"{what}; use --optimiser {owner} or leave it out")
    if problems:
        raise ConfigError("\n".join(problems))


def _value(flag: Flag, value: Any) -> Any:
    hint = _of_optional(flag.hint)
    if get_origin(hint) is dict:
        return dict(_pair(flag.name, entry, get_args(hint)[1]) for entry in value)
    if _is_names(hint):
        return names(value)
    return tuple(value) if isinstance(value, list) else value


def names(entries: list[str]) -> str | tuple[str, ...]:
    """Layers as `to` wants them: "all-linear" or an expression as it is, names (several, with commas, or one) as a tuple."""
    if len(entries) == 1 and not PLAIN_NAMES.fullmatch(entries[0]):
        return entries[0]
    return tuple(
        name
        for entry in entries
        for name in (entry.split(",") if PLAIN_NAMES.fullmatch(entry) else [entry])
        if name
    )


def _pair(flag: str, entry: str, kind: Any) -> tuple[str, Any]:
    name, equals, value = entry.rpartition("=")
    try:
        if not equals:
            raise ValueError
        return name, _read(value, kind)
    except ValueError:
        raise ConfigError(
            f"{flag} {entry!r} is not NAME=VALUE with {settings.describe(kind)} as value, e.g. q_proj=4"
        ) from None


def _read(text: str, kind: Any) -> Any:
    """The text as the first type of `kind` (int, or float | str) that takes it. Raises ValueError."""
    *first, last = get_args(kind) or (kind,)
    for one in first:
        with suppress(ValueError):
            return one(text)
    return last(text)


def over(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file, replaced by those given on the command line; single options replace single options."""
    merged = {**file, **given}
    for name in KINDS:
        if isinstance(file.get(name), Mapping) and name in given:
            merged[name] = {**file[name], **given[name]}
    return merged
