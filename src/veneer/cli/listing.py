"""Lists every method, start and optimiser with its formula, paper and options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from veneer import methods, optim
from veneer.cli.flags import flag_of_method, shown_default
from veneer.errors import ConfigError, suggest
from veneer.methods import Delta, inits
from veneer.methods.base.described import Described, helps_of, of_module, option_helps
from veneer.settings import describe


def listing(names: Sequence[str] = ()) -> dict[str, Any]:
    """Returns methods, starts and optimisers.

    names: methods, starts or optimisers to list; all unless given
    """
    return of(names) if names else every()


def every() -> dict[str, Any]:
    """{"methods": [..], "inits": [..], "optimisers": [..]} with what modules and signatures say, ready for
    JSON.
    """
    return {
        "methods": [
            {"name": n, **_about(of_module(methods.get(n))), "options": _options(methods.get(n))}
            for n in methods.available()
        ],
        "inits": [
            {"name": n, **_about(of_module(inits.get(n))), "options": _of_start(n)} for n in inits.available()
        ],
        "optimisers": [
            {"name": n, **_about(of_module(optim.get(n))), "options": _own_options(n)}
            for n in optim.available()
        ],
    }


def of(names: Sequence[str]) -> dict[str, Any]:
    """Returns the same for these alone. Raises ConfigError for all unknown names."""
    found = every()
    known = {entry["name"] for entries in found.values() for entry in entries}
    unknown = [
        f"no method, start or optimiser is called {name!r}{suggest(name, known)}"
        for name in names
        if name not in known
    ]
    if unknown:
        raise ConfigError("\n".join(unknown))
    return {kind: [entry for entry in entries if entry["name"] in names] for kind, entries in found.items()}


def text(found: dict[str, Any]) -> str:
    """Returns the listing for people."""
    lines = []
    for m in found["methods"]:
        lines += ["", f"{m['name']}: {m['summary']}", *([f"  {m['paper']}"] if m["paper"] else [])]
        flags = [(flag_of_method(m["name"], o["name"]).replace("_", "-"), o) for o in m["options"]]
        lines += [f"  --{flag}: {o['help']}{shown_default(o['default'])}" for flag, o in flags]
    lines += ["", "how the factors of a low-rank method start (--init):"] if found["inits"] else []
    for i in found["inits"]:
        lines += [f"  {i['name']}: {i['summary']}{' ' + i['paper'] if i['paper'] else ''}"]
        lines += [
            f"    --init-options {o['name']}=..: {o['help']}{shown_default(o['default'])}"
            for o in i["options"]
        ]
    lines += ["", "what makes steps of gradients (--optimiser):"] if found["optimisers"] else []
    for o in found["optimisers"]:
        lines += [f"  {o['name']}: {o['summary']}{' ' + o['paper'] if o['paper'] else ''}"]
        lines += [
            f"    --{o['name']}-{p['name'].replace('_', '-')}: {p['help']}{shown_default(p['default'])}"
            for p in o["options"]
        ]
    return "\n".join(lines[1:])


def _about(found: Described) -> dict[str, str | None]:
    return {"summary": found.summary, "paper": found.paper}


def _options(method: type[Delta]) -> list[dict[str, Any]]:
    return _listed(methods.options_of(method), option_helps(method))


def _of_start(init: str) -> list[dict[str, Any]]:
    known = inits.options_of(init)
    return _listed(known, helps_of(inits.get(init).start, known))


def _own_options(optimiser: str) -> list[dict[str, Any]]:
    known = optim.options_of(optimiser)
    return _listed(known, helps_of(optim.get(optimiser).__init__, known))


def _listed(known: Mapping[str, inspect.Parameter], helps: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"name": n, "type": describe(p.annotation), "default": p.default, "help": helps.get(n, "")}
        for n, p in known.items()
    ]
