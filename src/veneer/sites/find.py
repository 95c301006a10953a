"""Finds the layers of a model that are adapted, from patterns of names."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from veneer.errors import SiteError, first_few
from veneer.sites.base import Site
from veneer.sites.finding.all_linear import all_linear, leave_out
from veneer.sites.finding.kinds import kind_of, layers_of, site_for
from veneer.sites.finding.names import Target, by_name, check_exclude, excluded, meant
from veneer.sites.finding.unfit import refuse_unknown_stacks, unfit
from veneer.sites.own import base_modules
from veneer.sites.roles import output_head, resolved, without_idle

ALL = "all-linear"


def find(model: nn.Module, to: Target = ALL, exclude: Target = (), untie: bool = False) -> list[Site]:
    """Returns the sites that `to` names, in the model's order.

    to: "all-linear" (every Linear and Conv1D but the output head and unfit layers), a role such as
    "attention" (see roles), a regular expression for whole names, or a list of roles, names and endings of
    names ("q_proj"). exclude: the same, but "all-linear"; leaves out layers inside a module that it names
    too. Raises SiteError, before anything is changed, for an entry that matches nothing. Unless `to` is
    "all-linear", also for an unfit layer: one of an unknown kind, one whose owner reads its weight directly,
    and (unless `untie`) one that shares its weight with another.
    """
    layers, head = layers_of(model), output_head(model)
    kinds = {n: k.kind for n, m in layers.items() if n not in head and (k := kind_of(m))}
    refuse_unknown_stacks(layers, () if to == ALL else to)
    wanted = all_linear(kinds) if to == ALL else by_name(layers, resolved(model, to, kinds))
    without = without_idle(exclude, resolved(model, exclude, kinds), wanted)
    check_exclude(wanted, without)
    names = [n for n in wanted if not excluded(n, without)]
    if not names:
        raise SiteError(f"no layer is left to adapt: to={to!r}, exclude={exclude!r}")
    problems = unfit(layers, names, untie)
    if to == ALL:
        names = leave_out(names, problems)
    elif problems:
        raise SiteError("\n".join(p.text for p in problems))
    return [site_for(n, layers[n]) for n in names]


def named(
    model: nn.Module, to: Target | None, exclude: Target, fits: Callable[[nn.Module], bool]
) -> list[str]:
    """Returns the modules of any class that fit and that `to` names, all for None, in the model's order.

    to, exclude: as in find, without "all-linear" and roles. Raises SiteError for an entry that names none.
    """
    modules = [n for n, m in base_modules(model).items() if fits(m)]
    entries: list[Target] = [] if to is None else [to] if isinstance(to, str) else [[entry] for entry in to]
    idle = [e if isinstance(e, str) else e[0] for e in entries if not any(meant(n, e) for n in modules)]
    if idle:
        some = first_few(modules, 3)
        raise SiteError(
            "\n".join(f"no module that fits is called {e!r}; there are e.g. {some}" for e in idle)
        )
    names = [n for n in modules if to is None or meant(n, to)]
    check_exclude(names, exclude)
    return [n for n in names if not excluded(n, exclude)]
