"""Works out each layer's own options and builds all deltas, or lists all problems."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from veneer import methods
from veneer.adapt.leading_parts import Ahead
from veneer.errors import ConfigError, ShapeError, first_few
from veneer.methods import Delta, Stats
from veneer.sites import Site


def build_all(
    kind: type[Delta],
    sites: list[Site],
    options: list[dict[str, Any]],
    stats: Mapping[str, Stats] | None = None,
) -> list[tuple[Site, Delta]]:
    """Builds every delta. Raises ShapeError naming every layer that does not fit. stats: by layer."""
    _check_stats(kind, sites, stats)
    built, problems, ahead = [], [], Ahead(kind, sites, options)
    for i, (site, own) in enumerate(zip(sites, options, strict=True)):
        try:
            built.append(
                (
                    site,
                    methods.build(kind, site, own, ahead.of(i, None if stats is None else stats[site.name])),
                )
            )
        except ShapeError as e:
            problems.append(str(e))
    if problems:
        raise ShapeError("\n".join([*problems[:5], *[f"and {len(problems) - 5} more"][: len(problems) > 5]]))
    return built


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
    for option, pattern in (("rank", ranks), ("alpha", alphas)):
        hit = next((v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", site)), None)
        if hit is not None:
            found[option] = hit
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
    idle = [k for k in pattern if not any(re.match(rf"(.*\.)?({k})$", s.name) for s in sites)]
    if idle:
        raise ConfigError(
            f"rank_pattern or alpha_pattern matches no adapted layer: {first_few(idle)}; there are "
            f"{first_few(s.name for s in sites)}"
        )
