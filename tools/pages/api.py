"""Generates the page of the Python interface: signatures and docstrings of public functions."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import veneer
from pages.markdown import escaped, prose, table
from veneer import errors, methods, settings, sites
from veneer.cli.table import VERBS
from veneer.methods import inits
from veneer.methods.base.described import of_doc
from veneer.train.folder.result import Result
from veneer.train.run import Run

HEAD = """# Python

`import veneer` needs PyTorch and safetensors; names are imported on first use. Errors that a user can fix are
subclasses of `veneer.errors.VeneerError`."""

# Functions of verbs that build their own call, and classes for writing new methods.
HOMES = {
    "plan": "veneer.verbs.plan.plan:plan",
    "compare": "veneer.verbs.search.compare:compare",
    "rank": "veneer.verbs.search.rank:rank",
}
PARTS = {
    "veneer.methods": (methods.Delta, methods.Factors),
    "veneer.sites": (sites.Site,),
    "veneer.methods.inits": (inits.Start,),
}


def page() -> str:
    """Returns the whole page."""
    parts = [
        HEAD,
        "## veneer",
        *(_entry("veneer", name, getattr(veneer, name)) for name in veneer.__all__ if name != "Run"),
    ]
    parts += [
        "## Run",
        f"```python\nveneer.Run({', '.join(_required())}, ..)\n```",
        prose(inspect.getdoc(Run) or ""),
        _settings(),
    ]
    parts += ["## Result", prose(inspect.getdoc(Result) or "")]
    parts += ["## Verbs", "The functions behind the commands, with the same settings."]
    parts += [_entry(f.__module__, f.__name__, f) for f in _verbs()]
    parts += ["## Errors", table(("veneer.errors", "exit code", "meaning"), _errors())]
    parts += [
        "## For new methods",
        *(_class(module, kind) for module, kinds in PARTS.items() for kind in kinds),
    ]
    parts += ["## Modules", table(("module", "content"), _modules())]
    return "\n\n".join(parts) + "\n"


def _verbs() -> Iterator[Callable[..., Any]]:
    for verb, row in sorted(VERBS.items()):
        module, _, name = HOMES.get(verb, row.home).partition(":")
        if verb not in veneer.__all__ and not module.startswith("veneer.cli."):
            yield getattr(import_module(module), name)


def _entry(module: str, name: str, function: Callable[..., Any]) -> str:
    signature = _bare(inspect.signature(function))
    doc = prose(inspect.getdoc(function) or "", list(signature.parameters))
    return f"### {module}.{name}\n\n```python\n{_laid_out(name, signature)}\n```\n\n{doc}"


class Bare(NamedTuple):
    """An annotation, shown without quotes."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _bare(signature: inspect.Signature) -> inspect.Signature:
    rows = [p.replace(annotation=_shown(p.annotation)) for p in signature.parameters.values()]
    return signature.replace(parameters=rows, return_annotation=_shown(signature.return_annotation))


def _shown(annotation: Any) -> Any:
    return Bare(annotation) if isinstance(annotation, str) else annotation


def _laid_out(name: str, signature: inspect.Signature) -> str:
    """Returns the signature; a long one has one parameter per line."""
    line = f"{name}{signature}"
    if len(line) <= 100:
        return line
    end = str(signature).rpartition(")")[2]
    rows = [str(p) for p in signature.parameters.values()]
    star = next((i for i, p in enumerate(signature.parameters.values()) if p.kind is p.KEYWORD_ONLY), None)
    if star is not None:
        rows.insert(star, "*")
    return f"{name}(\n" + "".join(f"    {row},\n" for row in rows) + f"){end}"


def _class(module: str, kind: type) -> str:
    parts = [f"### {module}.{kind.__name__}", prose(inspect.getdoc(kind) or "")]
    for name, member in vars(kind).items():
        if not name.startswith("_") and inspect.isfunction(member):
            parts.append(
                f"`{name}{_bare(inspect.signature(member))}`\n:"
                f" {prose(inspect.getdoc(member) or '').replace(chr(10), chr(10) + '  ')}"
            )
    return "\n\n".join(parts)


def _required() -> list[str]:
    return [f"{s.name}=.." for s in settings.table(Run).values() if s.default is settings.REQUIRED]


def _settings() -> str:
    rows = []
    for s in settings.table(Run).values():
        default = "" if s.default is settings.REQUIRED else f"`{s.default!r}`"
        unit = f", in {s.unit}" if s.unit else ""
        rows.append((f"`{s.name}`", escaped(settings.describe(s.hint) + unit), default, escaped(s.help)))
    return table(("setting", "type", "default", "meaning"), rows)


def _errors() -> Iterator[tuple[str, str, str]]:
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.VeneerError):
            yield f"`{name}`", str(kind.exit_code), escaped(inspect.getdoc(kind) or "")


def _modules() -> Iterator[tuple[str, str]]:
    """Yields names and summaries out of the files: a module may need a package that is not installed."""
    for found in pkgutil.walk_packages(veneer.__path__, "veneer."):
        if found.name != "veneer.__main__":
            yield f"`{found.name}`", escaped(of_doc(_docstring(found.name)).summary)


def _docstring(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
