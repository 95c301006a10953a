"""Checks of options that several methods have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from veneer.errors import ConfigError, ShapeError, suggest
from veneer.ops.matrix.linalg import check_at_most
from veneer.sites import Site

MOST = 1 << 20  # of a size that no shape limits


def check_rank(rank: int, site: Site) -> None:
    """Raises ShapeError unless 1 <= rank <= min(out, in)."""
    check_at_most(rank, min(site.out, site.in_), "min(out, in)", site.name)


def check_free_rank(rank: int, site: Site, most: int = MOST) -> None:
    """Raises ShapeError unless rank is an integer from 1 to `most`, a bound that no shape sets."""
    check_at_most(rank, most, f"2^{most.bit_length() - 1}", site.name)


def check_dropout(dropout: float) -> None:
    """Raises ConfigError unless 0 <= dropout < 1."""
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be in [0, 1), got {dropout}")


def check_above_zero(**numbers: float | None) -> None:
    """Raises ConfigError for every number that is not finite and above 0; None stands for a default."""
    wrong = [f"{n} must be a number above 0, got {v}" for n, v in numbers.items() if not _is_positive(v)]
    if wrong:
        raise ConfigError("\n".join(wrong))


def _is_positive(value: float | None) -> bool:
    return value is None or 0 < value < math.inf


def check_choice(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ConfigError with the nearest known name unless `name` is one of `known`."""
    names = list(known)
    if name not in names:
        raise ConfigError(f"unknown {kind} {name!r}{suggest(name, names)}")


def check_divides(what: str, value: int, sizes: Mapping[str, int], site: Site) -> None:
    """Raises ShapeError unless `value`, called `what`, divides all sizes; names a smaller divisor."""
    odd = [f"{name} = {size}" for name, size in sizes.items() if value < 1 or size % value]
    if odd:
        fitting = next(n for n in range(max(value, 1), 0, -1) if all(s % n == 0 for s in sizes.values()))
        raise ShapeError(
            f"{what} {value} does not divide {' and '.join(odd)} at {site.name!r};"
            f" use e.g. {fitting}, or exclude the layer"
        )


def scaling_of(alpha: float | None, rank: int, *, default: float, stabilised: bool = False) -> float:
    """Returns s = alpha / r (alpha / sqrt(r) if stabilised), or `default` for None. Raises ConfigError."""
    check_above_zero(alpha=alpha)
    return default if alpha is None else alpha / (math.sqrt(rank) if stabilised else rank)
