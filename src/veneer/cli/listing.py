"""What `veneer methods` shows: every method, start and optimiser with its formula, paper and options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from veneer import methods, optim
from veneer.cli.flags import helps_of, option_helps, shown_default
from veneer.methods import Delta, inits
from veneer.train.settings import describe


def every() -> dict[str, Any]:
    """{"methods": [..], "inits": [..], "optimisers": [..]} with what modules and signatures say, ready for JSON."""
    return {
        "methods": [{"name": n, **_about(_module_doc(methods.get(n))), "options": _options(methods.get(n))} for n in methods.available()],
        "inits": [{"name": n, **_about(inspect.getdoc(inits.get(n)) or "")} for n in inits.available()],
        "optimisers": [{"name": n, **_about(_module_doc(optim.get(n))), "options": _own_options(n)} for n in optim.available()],
    }


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for m in found["methods"]:
        lines += ["", f"{m['name']}: {m['summary']}", *([f"  {m['paper']}"] if m["paper"] else [])]
        lines += [f"  --{o['name'].replace('_', '-')}: {o['help']}{shown_default(o['default'])}" for o in m["options"]]
    lines += ["", "how the factors of a low-rank method start (--init):"]
    lines += [f"  {i['name']}: {i['summary']}{' ' + i['paper'] if i['paper'] else ''}" for i in found["inits"]]
    lines += ["", "what makes steps of gradients (--optimiser):"]
    for o in found["optimisers"]:
        lines += [f"  {o['name']}: {o['summary']}{' ' + o['paper'] if o['paper'] else ''}"]
        lines += [f"    --{o['name']}-{p['name'].replace('_', '-')}: {p['help']}{shown_default(p['default'])}" for p in o["options"]]
    return "\n".join(lines[1:])


def _module_doc(method: type) -> str:
    return inspect.getdoc(inspect.getmodule(method)) or ""


def _about(doc: str) -> dict[str, str | None]:
    """The first paragraph of a module's docstring, parted into what it is and the paper's address."""
    first = " ".join(doc.split("\n\n")[0].split())
    found = re.search(r"https?://\S+", first)
    return {"summary": first[: found.start()].rstrip(" ,.") if found else first, "paper": found.group().rstrip(".,)") if found else None}


def _options(method: type[Delta]) -> list[dict[str, Any]]:
    return _listed(methods.options_of(method), option_helps(method))


def _own_options(optimiser: str) -> list[dict[str, Any]]:
    known = optim.options_of(optimiser)
    return _listed(known, helps_of(optim.get(optimiser).__init__, known))


def _listed(known: Mapping[str, inspect.Parameter], helps: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": n, "type": describe(p.annotation), "default": p.default, "help": helps.get(n, "")} for n, p in known.items()]
