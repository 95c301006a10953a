"""Makes flags from declarations: the fields of a settings dataclass, a function's parameters, all options."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import typer
from rich.markup import escape

from veneer import methods, optim, settings, tasks
from veneer.cli import panels
from veneer.cli.panels import OTHER, panel_of, place
from veneer.methods import inits
from veneer.methods.base.described import helps_of, option_helps
from veneer.train.run import Run

T = TypeVar("T")
# Settings that hold options, which have flags of their own.
METHOD, OPTIMISER, TASK = "options", "optimiser_options", "task_options"
RANK, BY_PILOT = "rank", int | Literal["auto"]  # auto: a pilot decides, in veneer fit
OF_THE_RUN = ("seed",)  # options that the setting of this name gives to every method
COMPLETED: Mapping[str, Callable[[], Iterable[str]]] = {  # by the shell, from registries
    "method": methods.available,
    "init": inits.available,
    "optimiser": optim.available,
    "task": tasks.available,
}
KINDS = {METHOD: "method", OPTIMISER: "optimiser", TASK: "task"}  # whose options these are


class Flag(NamedTuple):
    """One flag: its setting, the type of the setting's value, and its help text.

    owners: the methods or optimisers whose option it is; into, key: the setting that holds it, and its name
    there; argument: given by its place, without --name.
    """

    name: str
    hint: Any
    help: str
    metavar: str = ""
    owners: tuple[str, ...] = ()
    required: bool = False
    argument: bool = False
    into: str = ""
    key: str = ""
    panel: str = OTHER


def of_settings(kind: type) -> list[Flag]:
    """Returns a flag for every field of a settings dataclass but those that hold options."""
    rows = settings.table(kind).values()
    return [
        Flag(s.name, s.hint, s.help + shown_default(s.default), s.unit, panel=panel_of(s.name, s.panel))
        for s in rows
        if s.name not in KINDS
    ]


def of_function(function: Callable[..., Any], without: Collection[str] = ("progress",)) -> list[Flag]:
    """Returns a flag, or an argument if given by place, for every parameter but `without`."""
    parameters = inspect.signature(function, eval_str=True).parameters
    helps = helps_of(function, parameters)
    made = []
    for name, p in parameters.items():
        if name not in without:
            required = p.default is p.empty
            by_place = p.kind is p.POSITIONAL_OR_KEYWORD and (required or p.default == ())
            text = helps.get(name, "") + ("" if required else shown_default(p.default))
            made.append(Flag(name, p.annotation, text, required=required, argument=by_place))
    return made


def of_methods() -> list[Flag]:
    """Returns a flag for every option of any method; methods that share an option share its flag."""
    found: dict[str, Flag] = {}
    helps: dict[str, dict[str, str]] = {}
    for method in methods.available():
        kind = methods.get(method)
        texts = option_helps(kind)
        for key, p in methods.options_of(kind).items():
            if key in OF_THE_RUN:
                continue
            name = flag_of_method(method, key)
            panel = panel_of(name, panels.METHOD)
            hint = BY_PILOT if key == RANK and p.annotation is int else p.annotation
            before = found.setdefault(name, Flag(name, hint, "", into=METHOD, key=key, panel=panel))
            if before.hint != hint:
                other = f"of {before.owners} a {before.hint}"
                raise TypeError(f"option {key!r} of method {method!r} is a {p.annotation}, {other}")
            found[name] = before._replace(owners=(*before.owners, method))
            helps.setdefault(name, {})[method] = f"{texts.get(key, '')}{shown_default(p.default)}"
    return [flag._replace(help=_by_owner(helps[name])) for name, flag in found.items()]


def flag_of_method(method: str, option: str) -> str:
    """Returns the flag's name: the option's own, unless a setting of the run has that name."""
    return f"{method}_{option}" if option in settings.table(Run) and option not in OF_THE_RUN else option


def _by_owner(helps: Mapping[str, str]) -> str:
    """Returns a flag's help: one text if all owners agree, else a paragraph for each text with its owners."""
    alike: dict[str, list[str]] = {}
    for owner, text in helps.items():
        alike.setdefault(text, []).append(owner)
    return "\n\n".join(
        alike if len(alike) == 1 else (f"{', '.join(owners)}: {text}" for text, owners in alike.items())
    )


def of_optimisers() -> list[Flag]:
    """Returns a flag for every option of every optimiser, prefixed by its name: --loraplus-ratio."""
    return _of_owners(optim, OPTIMISER, panels.OPTIMISER)


def of_tasks() -> list[Flag]:
    """Returns a flag for every option of every task, prefixed by the task's name."""
    return _of_owners(tasks, TASK, panels.MODEL)


def _of_owners(choices: Any, into: str, panel: str) -> list[Flag]:
    made = []
    for name in choices.available():
        known = choices.options_of(name)
        helps = helps_of(choices.get(name).__init__, known)
        for option, p in known.items():
            text = f"{helps.get(option, '')}{shown_default(p.default)}"
            flag = f"{name}_{option}".replace("-", "_")
            own = Flag(flag, p.annotation, text, owners=(name,), into=into, key=option)
            made.append(own._replace(panel=panel))
    return made


def shown_default(value: Any) -> str:
    """Returns " [8]", or nothing for a default that says nothing."""
    if value is settings.REQUIRED or value is None or value == () or value == {} or value == "":
        return ""
    if isinstance(value, bool):
        return f" [{'yes' if value else 'no'}]"
    return f" [{' '.join(map(str, value)) if isinstance(value, tuple) else value}]"


def declare(function: Callable[..., T], flags: Iterable[Flag]) -> Callable[..., T]:
    """Returns the function, which takes **values, with the signature from which typer makes its flags and
    these.

    None, and an empty list, stand for a flag that was not given. Flags come panel by panel.
    """
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    every = [*(p for p in parameters if p.kind is not p.VAR_KEYWORD), *map(_parameter, flags)]
    by_place = [p for p in every if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_word = sorted((p for p in every if p.kind is p.KEYWORD_ONLY), key=_panel)
    function.__signature__ = inspect.Signature([*by_place, *by_word])  # type: ignore[attr-defined]
    return function


def _panel(p: inspect.Parameter) -> int:
    return place(get_args(p.annotation)[1].rich_help_panel)


def _parameter(flag: Flag) -> inspect.Parameter:
    kind = parsed(flag.hint) if flag.required else parsed(flag.hint) | None
    return inspect.Parameter(
        flag.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD if flag.argument else inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if flag.required else None,
        annotation=Annotated[kind, _info(flag)],
    )


def _info(flag: Flag) -> Any:
    text = escape(flag.help)
    if flag.argument:
        return typer.Argument(metavar=flag.name.upper(), help=text, show_default=False)
    name, unit = word(flag.name), flag.metavar or words(flag.hint)
    return typer.Option(
        f"{name}/--no-{name[2:]}" if flag.hint is bool else name,
        help=text,
        show_default=False,
        metavar=None if flag.hint is bool else f"<{unit}>",
        rich_help_panel=flag.panel,
        autocompletion=_completed(flag.name),
    )


def _completed(name: str) -> Callable[[str], list[str]] | None:
    """Returns the shell's completion of a flag's value: names of a registry, or None for another flag."""
    known = COMPLETED.get(name)
    return None if known is None else lambda incomplete: [n for n in known() if n.startswith(incomplete)]


def word(name: str) -> str:
    """Returns the flag of a setting: --weight-decay."""
    return f"--{name.replace('_', '-')}"


def parsed(hint: Any) -> Any:
    """Returns what typer parses for a setting's type: lists of texts for repeated flags and NAME=VALUE."""
    hint = of_optional(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if (
        hint in (str, int, float, bool, Path)
        or origin is Literal
        or (origin is tuple and Ellipsis not in inner)
    ):
        return hint
    if is_number_or_word(hint):
        return str
    if origin is dict or inner == (str, ...) or (origin is Sequence and inner == (str,)) or is_names(hint):
        return list[str]
    raise TypeError(f"no flag can be made for a {hint}")


def words(hint: Any) -> str:
    """Returns the words for what a flag takes, for --help."""
    hint = of_optional(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is dict:
        return f"name={words(inner[1])}"
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin is tuple and Ellipsis not in inner:
        return " ".join(map(words, inner))
    if is_number_or_word(hint):
        return "|".join(map(words, inner))
    return {str: "text", int: "integer", float: "number", Path: "path"}.get(hint, "text, repeatable")


def of_optional(hint: Any) -> Any:
    inner = [h for h in get_args(hint) if h is not type(None)]
    return inner[0] if get_origin(hint) in (Union, types.UnionType) and len(inner) == 1 else hint


def is_number_or_word(hint: Any) -> bool:
    """Returns True for settings that are a whole number or one of some words: int | Literal["auto"]."""
    inner = get_args(hint)
    return len(inner) == 2 and inner[0] is int and get_origin(inner[1]) is Literal


def is_names(hint: Any) -> bool:
    """Returns True for settings of an expression or names: str | tuple[str, ...], or None besides."""
    return get_origin(hint) in (Union, types.UnionType) and set(get_args(hint)) - {type(None)} == {
        str,
        tuple[str, ...],
    }
