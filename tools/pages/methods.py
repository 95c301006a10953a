"""The page of methods, starts and optimisers: what their files say of themselves, and a hand-written note
where there is one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pages.markdown import escaped, prose, table
from veneer import methods, optim
from veneer.adapt.peft import types
from veneer.cli.flags import flag_of_method, shown_default
from veneer.methods import Delta, PeftKind, inits
from veneer.methods.base.described import Described, helps_of, of_module, option_helps

HEAD = """# Methods, starts and optimisers

Every method is one file of `veneer.methods`, every start one of `veneer.methods.inits`, every optimiser one
of `veneer.optim`. This page is generated from their signatures and docstrings; `veneer methods` prints the
short form.
`CONTRIBUTING.md` in the repository shows how one is added."""


PEFT_HEAD = """## Types of PEFT

PEFT 0.21 saves these types of adapters. *Exactly*: a method of Veneer reads the file's own numbers, and most
write them too. *To rounding*: `veneer convert ADAPTER --to veneer --model BASE --out OUT` lets PEFT (`pip
install 'veneer[peft]'`) merge one layer at a time in float64, compares the merged layer's outputs with those
of PEFT's adapter, and keeps the change in float32 in the layout named here, or in a smaller one. Factors can
be written in every format of `--to`. *For its own base*: the change is computed from that base's weights,
whose fingerprint is saved with it."""


class Entry(NamedTuple):
    """One file: about: its docstring; options: by name, with their helps; facts: sentences about it that
    the code knows."""

    name: str
    about: Described
    options: Mapping[str, inspect.Parameter]
    helps: Mapping[str, str]
    facts: tuple[str, ...]
    flag: Callable[[str], str]


def page(notes: Path) -> str:
    """The whole page. notes: folder of hand-written notes by name."""
    kinds = {"Methods": _methods(), "Starts": _starts(), "Optimisers": _optimisers()}
    parts = [HEAD]
    for title, entries in kinds.items():
        rows = [
            (
                f"[{e.name}](#{e.name})",
                escaped(e.about.summary),
                f"[paper]({e.about.paper})" if e.about.paper else "",
            )
            for e in entries
        ]
        parts += [
            f"## {title}",
            table(("name", "what it is", ""), rows),
            *(_entry(e, notes) for e in entries),
        ]
    return "\n\n".join([*parts, _peft_types()]) + "\n"


def _peft_types() -> str:
    """Every type of adapter that PEFT saves, and how it opens."""
    ways = {"load": "exactly: `veneer.load`", "convert": "to rounding: `veneer convert`", "no": "refused"}
    rows = [(f"`{name}`", ways[way.by], escaped(way.how)) for name, way in types.every().items()]
    return f"{PEFT_HEAD}\n\n{table(('type', 'opens', 'how, or why not'), rows)}"


def _entry(e: Entry, notes: Path) -> str:
    paper = f" ([paper]({e.about.paper}))" if e.about.paper else ""
    parts = [f"### {e.name}", f"{escaped(e.about.summary)}{paper}.", prose(e.about.rest), *e.facts]
    if e.options:
        rows = [
            (f"`{e.flag(n)}`", escaped(e.helps.get(n, "")) + escaped(shown_default(p.default)))
            for n, p in e.options.items()
        ]
        parts.append(table(("option", "meaning"), rows))
    note = notes / f"{e.name}.md"
    if note.is_file():
        parts.append(note.read_text(encoding="utf-8").strip())
    return "\n\n".join(part for part in parts if part)


def _methods() -> list[Entry]:
    return [_method(name, methods.get(name)) for name in methods.available()]


def _method(name: str, kind: type[Delta]) -> Entry:
    file = (
        "PEFT's files, wherever PEFT can express the layer"
        if issubclass(kind, PeftKind)
        else "Veneer's own file, [`delta.safetensors`](../format.md#the-tensors)"
    )
    roles = ", ".join(f"`{p}`" for p in kind.roles) or "none that optimisers treat apart"
    facts = (
        f'Use it: `veneer fit --method {name}`, `veneer.attach(model, "{name}")`. Saved in {file}. Roles:'
        f" {roles}.",
    )
    return Entry(
        name,
        of_module(kind),
        methods.options_of(kind),
        option_helps(kind),
        facts,
        lambda option: _flag(name, option),
    )


def _starts() -> list[Entry]:
    return [_start(name, inits.get(name)) for name in inits.available()]


def _start(name: str, module: Any) -> Entry:
    known = inits.options_of(name)
    facts = (f"Use it: `--init {name}`. {module.NEEDS.sentence}".rstrip(),)
    return Entry(
        name,
        of_module(module.start),
        known,
        helps_of(module.start, known),
        facts,
        lambda option: f"init_options: {option}",
    )


def _optimisers() -> list[Entry]:
    return [_optimiser(name, optim.get(name)) for name in optim.available()]


def _optimiser(name: str, kind: Any) -> Entry:
    known = optim.options_of(name)
    needs = f" It needs a method with {', '.join(sorted(kind.needs))}." if kind.needs else ""
    facts = (f"Use it: `--optimiser {name}`.{needs}",)
    return Entry(
        name,
        of_module(kind),
        known,
        helps_of(kind.__init__, known),
        facts,
        lambda option: f"--{name}-{option.replace('_', '-')}",
    )


def _flag(method: str, option: str) -> str:
    return f"--{flag_of_method(method, option).replace('_', '-')}"
