"""Checks the effect of a loaded adapter on the outputs, through the way it will act."""

from __future__ import annotations

from torch import nn

from veneer.adapt import probe
from veneer.adapt.acting.reads import watching_reads
from veneer.adapt.store.loaded import Loaded
from veneer.adapt.store.problems import Problem, refuse
from veneer.errors import first_few
from veneer.methods.base.token_rows import TokenRows


def refuse_effect(model: nn.Module, found: Loaded, run: probe.Run) -> frozenset[str]:
    """Returns the words that let a problem through, earlier ones included.

    run: calls the model with and without the adapter. Raises FormatError if the outputs differ from those
    kept in veneer.json or, for another program's folder, equal the base's.
    """
    problems: list[Problem] = []
    with watching_reads(model) as unheard:
        if found.probe:
            problems = [Problem("probe", text) for text in probe.check(model, run, found.probe)]
        elif found.foreign and probe.is_idle(model, run, _tokens(found)):
            text = "the outputs with it are those of the base, bit for bit;"
            text += " check that the model calls these layers"
            problems = [Problem("zero", text)]
    own = {site.name for site, _ in found.changes}
    deaf = [name for name in unheard if name in own]
    if deaf:
        text = f"the model reads the weights of {first_few(deaf)} itself and does not call these layers,"
        problems.append(Problem("zero", f"{text} so that a change of them does not act; merge it in PEFT"))
    return found.let_through | refuse(f"{found.folder} was not loaded", problems, found.allowed)


def _tokens(found: Loaded) -> list[int]:
    """Returns the tokens whose rows the adapter changes, each once."""
    own = [t for _, delta in found.changes if isinstance(delta, TokenRows) for t in delta.tokens]
    return [*dict.fromkeys(own)]
