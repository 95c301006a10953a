"""Chooses the rank of each layer: alike for all, or by predicted loss over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from veneer.compress.lowrank.recipe import Recipe
from veneer.errors import ConfigError, first_few
from veneer.ops import allocate
from veneer.ops.allocate import Choice
from veneer.sites.factored.layers import parameters_of, rank_within


class Size(NamedTuple):
    """A layer's W (out, in), and whether it has a bias of its own."""

    out: int
    in_: int
    bias: bool


class Cut(NamedTuple):
    """rank: None for a layer that stays dense. variant: the number of its candidate. loss: predicted, in nats
    a token.
    """

    rank: int | None
    variant: int = 0
    loss: float = 0.0


def step_of(size: Size, multiple: int) -> int:
    """Ranks are multiples of it: as asked, or 1, 8 or 64 by the smaller side."""
    least = min(size.out, size.in_)
    return multiple or (1 if least < 512 else 8 if least < 2048 else 64)


def uniform(sizes: Mapping[str, Size], recipe: Recipe) -> dict[str, Cut]:
    """Returns the rank by which every layer keeps the recipe's share of its own parameters; all dense at keep
    1.

    Raises ConfigError for layers of which not even one rank step would be left.
    """
    if recipe.keep == 1:
        return {n: Cut(None) for n in sizes}
    found, problems = {}, []
    for name, size in sizes.items():
        step, budget = step_of(size, recipe.multiple), recipe.keep * size.out * size.in_
        added = size.out if recipe.adds_bias and not size.bias else 0
        rank = rank_within(size.out, size.in_, budget - added, recipe.storage) // step * step
        if rank < 1:
            problems.append(f"{name} ({size.out} x {size.in_})")
        found[name] = Cut(rank)
    if problems:
        raise ConfigError(f"keep: {recipe.keep} leaves no rank for {first_few(problems)}; raise keep")
    return found


def by_loss(
    sizes: Mapping[str, Size], losses: Mapping[str, Sequence[tuple[Tensor, bool]]], recipe: Recipe
) -> dict[str, Cut]:
    """Returns the ranks of least predicted loss within the recipe's share of all parameters.

    losses: of every layer's candidates, (k + 1,) by rank, and whether the candidate adds a bias. Raises
    ConfigError if
    the budget is too small for one rank step everywhere.

    """
    budget = int(recipe.keep * sum(s.out * s.in_ for s in sizes.values()))
    cuts = {n: list(_cuts(sizes[n], losses[n], recipe)) for n in sizes}
    menus = [[Choice(cost, cut.loss) for cost, cut in cuts[n]] for n in sizes]
    chosen = (allocate.ilp if recipe.allocate == "ilp" else allocate.heap)(menus, budget)
    return {n: cuts[n][i][1] for n, i in zip(sizes, chosen, strict=True)}


def _cuts(size: Size, losses: Sequence[tuple[Tensor, bool]], recipe: Recipe) -> list[tuple[int, Cut]]:
    """The menu of one layer: dense, and every rank of every candidate that costs less than dense."""
    dense, step = size.out * size.in_, step_of(size, recipe.multiple)
    found = [(dense, Cut(None))]
    for variant, (own, with_bias) in enumerate(losses):
        added = size.out if with_bias and not size.bias else 0
        values = own.tolist()
        for rank in range(step, min(size.out, size.in_) + 1, step):
            cost = parameters_of(size.out, size.in_, rank, recipe.storage) + added
            if cost < dense:
                found.append((cost, Cut(rank, variant, float(values[rank]))))
    return found
