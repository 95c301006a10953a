"""Makes the calls of verbs that search over the settings of a Run."""

from __future__ import annotations

from typing import Any

from veneer.cli import flags, given
from veneer.cli.calls import Call, Json, show
from veneer.cli.plan_verb import Probe
from veneer.cli.run_verbs import Config, of_run, run_of
from veneer.cli.words import Debug

# Settings of a run that a search chooses itself, or that its trials do without.
OF_TRIALS = "out resume report save_every eval_every keep track samples patience".split()


def compare() -> Call:
    """Returns the call of `veneer compare`."""
    from veneer.search.compare.settings import Comparison
    from veneer.verbs.search import compare as verb

    own, shared = (
        flags.of_settings(Comparison),
        [f for f in of_run() if f.name not in ("method", "lr", *OF_TRIALS)],
    )

    def call(
        *,
        config: Config = None,
        probe: Probe = True,
        as_json: Json = False,
        debug: Debug = False,
        **values: Any,
    ) -> None:
        run = run_of(config, shared, values)
        found = verb.compare(run, Comparison(**given.values(own, values)), probe=probe)
        show(found, verb.text, as_json)

    return flags.declare(call, [*own, *shared])


def rank() -> Call:
    """Returns the call of `veneer rank`."""
    from veneer.search.rank.settings import RankSearch
    from veneer.verbs.search import rank as verb

    own, shared = flags.of_settings(RankSearch), [f for f in of_run() if f.name not in OF_TRIALS]

    def call(*, config: Config = None, as_json: Json = False, debug: Debug = False, **values: Any) -> None:
        run = run_of(config, shared, values)
        show(verb.rank(run, RankSearch(**given.values(own, values))), verb.text, as_json)

    return flags.declare(call, [*own, *shared])
