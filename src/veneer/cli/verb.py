"""Describes a command, and the groups that `veneer --help` lists."""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """One row of `veneer --help`.

    home: "module:function". The module also holds `text(outcome)`, which writes the function's outcome for
    people. checks: the module holds `exit_code(outcome)` besides. own: the function makes the call itself,
    with its flags.
    """

    group: str
    help: str
    examples: tuple[str, ...]
    home: str
    checks: bool = False
    own: bool = False


ADAPT, LOOK, CARRY, MEASURE = "Adapt a model", "Look", "Carry elsewhere", "Measure and check"
GROUPS = (ADAPT, LOOK, CARRY, MEASURE)
