"""Works out each layer's own options and builds all deltas, or lists all problems."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from veneer import foreign, methods
from veneer.adapt.leading_parts import Ahead
from veneer.errors import ConfigError, ShapeError, first_few
from veneer.methods import Delta, Stats
from veneer.methods.base.options import option
from veneer.sites import Site


def build_all(
    kind: type[Delta],
    sites: list[Site],
    options: list[dict[str, Any]],
    stats: Mapping[str, Stats] | None = None,
    *,
    by_default: bool = False,
) -> list[tuple[Site, Delta]]:
    """Builds every delta. Raises ShapeError naming every layer that does not fit. stats: by layer.

    by_default: the layers were not named; those too small for the rank get the largest that fits, those that
    do not fit at all are left out, and one warning counts both.
    """
    if by_default and stats:
        kept = [(s, o) for s, o in zip(sites, options, strict=True) if s.name in stats]
        sites, options = [s for s, _ in kept], [o for _, o in kept]
    _check_stats(kind, sites, stats)
    built: dict[int, Delta] = {}
    problems: dict[int, str] = {}
    ahead = Ahead(kind, sites, options)
    known = [ahead.of(i, None if stats is None else stats[site.name]) for i, site in enumerate(sites)]
    for i, (site, own) in enumerate(zip(sites, options, strict=True)):
        try:
            built[i] = methods.build(kind, site, own, known[i])
        except ShapeError as e:
            problems[i] = str(e)
    if problems and not (by_default and built):
        some = list(problems.values())
        raise ShapeError("\n".join([*some[:5], *[f"and {len(some) - 5} more"][: len(some) > 5]]))
    smaller = {i: d for i in problems if (d := _capped(kind, sites[i], options[i], known[i])) is not None}
    _warn([sites[i].name for i in smaller], [text for i, text in problems.items() if i not in smaller])
    every = {**built, **smaller}
    return [(sites[i], every[i]) for i in sorted(every)]


def _capped(kind: type[Delta], site: Site, options: dict[str, Any], stats: Stats | None) -> Delta | None:
    """Returns a delta of the largest rank that fits, at the scaling of the wanted one, or None."""
    if "rank" not in methods.options_of(kind):
        return None
    wanted, most = option(kind, "rank", options), min(site.out, site.in_)
    if not isinstance(wanted, int) or most >= wanted:
        return None
    share = most / wanted
    alpha = options.get("alpha")
    if alpha is not None:
        options = {**options, "alpha": alpha * (math.sqrt(share) if options.get("stabilised") else share)}
    try:
        return methods.build(kind, site, {**options, "rank": most}, stats)
    except ShapeError:
        return None


def _warn(capped: list[str], problems: list[str]) -> None:
    if capped:
        warnings.warn(
            f"{len(capped)} layers are smaller than the rank and get the largest that fits: "
            f"{first_few(capped, 3)}",
            stacklevel=4,
        )
    if problems:
        warnings.warn(
            f"all-linear leaves out {len(problems)} layers that the method does not fit: {problems[0]}",
            stacklevel=4,
        )


def _check_stats(kind: type[Delta], sites: list[Site], stats: Mapping[str, Stats] | None) -> None:
    if stats is None:
        return
    if not methods.takes_stats(kind):
        raise ConfigError(
            f"method {kind.__module__.rsplit('.', 1)[-1]!r} starts without a look at the loss; leave "
            "stats= out"
        )
    missing = [s.name for s in sites if s.name not in stats]
    if missing:
        raise ConfigError(
            f"stats= says nothing of {len(missing)} layers: {first_few(missing)}; calibrate with the same "
            "to= and exclude="
        )


def options_at(
    site: str,
    method: type[Delta],
    options: dict[str, Any],
    ranks: Mapping[str, int] | None,
    alphas: Mapping[str, float] | None,
) -> dict[str, Any]:
    found = dict(options)
    for setting, pattern in (("rank", ranks), ("alpha", alphas)):
        hit = next((v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", site)), None)
        if hit is not None:
            found[setting] = hit
    if found != options:  # which are checked already
        methods.check_options(method, found)
    return found


def check_patterns(sites: list[Site], pattern: Mapping[str, float]) -> None:
    for key in pattern:
        try:
            re.compile(key)
        except re.error as e:
            raise ConfigError(
                f"{key!r} in rank_pattern or alpha_pattern is not a regular expression: {e}"
            ) from None
    wrapped = [rf"(.*\.)?({key})$" for key in pattern]
    foreign.check_expressions(wrapped, [s.name for s in sites], "rank_pattern or alpha_pattern")
    idle = [k for k in pattern if not any(re.match(rf"(.*\.)?({k})$", s.name) for s in sites)]
    if idle:
        raise ConfigError(
            f"rank_pattern or alpha_pattern matches no adapted layer: {first_few(idle)}; there are "
            f"{first_few(s.name for s in sites)}"
        )
