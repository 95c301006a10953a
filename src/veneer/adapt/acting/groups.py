"""Runs fused experts once for each adapter of a batch, on that adapter's tokens.

A token's output depends on no other token, so that the groups' outputs together are those of the whole batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, ShapeError, SiteError
from veneer.methods.base.protocols import Routed
from veneer.sites import Site
from veneer.sites.bare.site import Holder, Holders, ParameterSite

# Names of the second argument of modules that route token by token, as in transformers 5.
ROUTES = ("top_k_index", "router_indices", "selected_experts")


class Group(NamedTuple):
    """The tokens of one adapter: their numbers, or None for all tokens of the call."""

    key: Hashable
    tokens: Tensor | None


class Waiting(NamedTuple):
    """A call of which the first group runs. args: of the whole call; groups: all of them."""

    args: tuple[Any, ...]
    groups: Sequence[Group]


def by_token(site: Site) -> bool:
    """Tells if the site is one of a stack of experts that gets a choice of experts for each token."""
    if not isinstance(site, ParameterSite) or site.module.index is None:
        return False
    second = list(inspect.signature(site.host.forward).parameters)[1:2]
    return any(name in ROUTES for name in second)


def routed(shelf: Holders) -> Routed | None:
    """Returns the change of a bank that acts at these matrices, or None.

    Raises ConfigError if other changes act beside it.
    """
    active = {n: s for h in shelf.children() for n, s in _deltas(h).active.items()}
    every = (_deltas(h)[n] for h in shelf.children() for n in _deltas(h).active)
    bank = next((d for d in every if isinstance(d, Routed)), None)
    if bank is None:
        return None
    if len(active) > 1 or set(active.values()) != {1.0}:
        raise ConfigError(
            f"a bank must act alone and at strength 1 at fused experts, got {active}; activate it alone"
        )
    return bank


def _deltas(holder: nn.Module) -> Any:
    return holder.deltas


def groups_of(own: Routed, owner: nn.Module, args: tuple[Any, ...]) -> list[Group]:
    """Returns the groups of a call. Raises SiteError or ShapeError for arguments that are not by token."""
    found = [a for a in args if isinstance(a, Tensor)]
    lengths = {len(a) for a in found}
    if len(found) < 2 or len(lengths) != 1:
        shapes = [tuple(a.shape) for a in found]
        raise SiteError(
            f"a {type(owner).__name__} must be called with tensors of one row a token, by place, to serve"
            f" several adapters, got {shapes}; use one adapter at a time"
        )
    (tokens,) = lengths
    return [Group(key, index) for key, index in own.groups(tokens)]


def chosen(args: tuple[Any, ...], index: Tensor) -> tuple[Any, ...]:
    """Returns the arguments of some tokens."""
    return tuple(a.index_select(0, index) if isinstance(a, Tensor) else a for a in args)


def rest(waiting: Waiting, first: Any, run: Callable[[Group, tuple[Any, ...]], Any]) -> Tensor:
    """Runs the other groups and returns the outputs of all tokens in their order."""
    indices = [g.tokens for g in waiting.groups if g.tokens is not None]
    outputs = [first]
    for group, index in list(zip(waiting.groups, indices, strict=True))[1:]:
        outputs.append(run(group, chosen(waiting.args, index)))
    if not all(isinstance(y, Tensor) and len(y) == len(i) for y, i in zip(outputs, indices, strict=True)):
        raise ShapeError("fused experts must return a tensor of one row a token to serve several adapters")
    return torch.cat(outputs).index_select(0, torch.cat(indices).argsort())


def holders_of(shelf: Holders) -> dict[str, list[Holder]]:
    """Returns the holders with acting changes by parameter."""
    every = shelf.by_parameter().items()
    found = {p: [h for h in holders if _deltas(h).active] for p, holders in every}
    return {p: holders for p, holders in found.items() if holders}
