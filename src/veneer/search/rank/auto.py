"""`--rank auto`: a short pilot before the run decides the rank of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.train.loop.progress import Voice
from veneer.train.run import Run

AUTO, RANK = "auto", "rank"
SHARE = 0.25  # of the run's steps: pilot and cuts then cost less than a third of the run
SUFFIX = "-rank"  # of the pilot's folder, beside that of the run


def asked(settings: Mapping[str, Any]) -> bool:
    """Tells if the rank is left to a pilot."""
    options = settings.get("options")
    return isinstance(options, Mapping) and options.get(RANK) == AUTO


def without(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings without a rank."""
    own = {k: v for k, v in settings["options"].items() if k != RANK}
    return {**settings, "options": own}


def ranked(run: Run, voice: Voice) -> Run:
    """Returns the run with the rank and the rank_pattern that a pilot supports, and says why.

    The pilot lasts a quarter of the run's steps at a high rank, in a folder beside run.out, and is reused by
    the same call. Patterns of the run replace the pilot's. Raises the errors of `fit`, and ConfigError for a
    method without a rank.
    """
    from veneer.search.rank.rank import chosen, rank  # the training, which most calls need not load here
    from veneer.search.rank.settings import RankSearch

    out = Path(f"{run.out.rstrip('/')}{SUFFIX}")
    plain = replace(run, out=str(out), resume=False)
    found = rank(plain, RankSearch(share=SHARE, out=str(out)), progress=voice.aloud)
    own = chosen(found)
    cost = SHARE * found["cost_ratio"]
    voice.say(
        f"rank {found['rank']} in the mean: {found['reason']} (a pilot of {found['pilot_steps']} steps and"
        f" its cuts, about {cost:.2f} of one run; {out})"
    )
    pattern = {**own.get("rank_pattern", {}), **run.rank_pattern}
    return replace(run, options={**run.options, RANK: found["rank"]}, rank_pattern=pattern)
