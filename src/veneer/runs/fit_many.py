"""`fit_many`: several adapters of one base, trained side by side in one pass a step, each in a run of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from veneer.errors import ConfigError
from veneer.runs.fit import Begun, begin, end, look, loop_of
from veneer.runs.prepare import NAME
from veneer.train.folder.result import Result
from veneer.train.loop import together
from veneer.train.loop.progress import Voice
from veneer.train.loop.signals import listening
from veneer.train.run import Run

SHARED = ("model", "precision", "quantise", "device", "gradient_checkpointing")


def fit_many(runs: Sequence[Run], *, progress: bool = True) -> list[Result]:
    """Trains all runs at once, and returns what came of each, in their order; each is a folder as `fit` writes it.

    They have one base in memory, and one pass through it for the batches of all; data, method, rank, rate, optimiser and
    length may be different. Every adapter learns what it would have learned alone, up to rounding; nothing is compiled.
    Raises ConfigError for runs that do not go together and for methods without a normal form, before anything is trained,
    and the errors of `fit`, for one run or another, with all of them saved.
    """
    _check(runs)
    with ExitStack() as stack:
        voices = [Voice(progress) for _ in runs]
        readies = [
            look(replace(run, compile="off"), voice, stack) for run, voice in zip(runs, voices, strict=True)
        ]
        together.share_base([ready.model for ready in readies])
        together.check({ready.run.out: ready.model for ready in readies}, NAME)
        opened = [begin(ready, voice, stack) for ready, voice in zip(readies, voices, strict=True)]
        going = [b for b in opened if isinstance(b, Begun)]
        ended = iter(_train(going, stack) if going else [])
        return [b if isinstance(b, Result) else next(ended) for b in opened]


def _train(going: Sequence[Begun], stack: ExitStack) -> list[Result]:
    bank = together.carry([b.ready.model for b in going], NAME)
    loops, wish = [loop_of(b) for b in going], stack.enter_context(listening())
    positions = together.run_together(loops, bank, wish)
    return [end(b, loop, position, wish) for b, loop, position in zip(going, loops, positions, strict=True)]


def _check(runs: Sequence[Run]) -> None:
    """Raises ConfigError for all reasons why these runs cannot be trained together."""
    if not runs:
        raise ConfigError("there is no run to train; give a list of them")
    values = {name: sorted({str(getattr(run, name)) for run in runs}) for name in SHARED}
    problems = [
        f"{name} must be the same for all runs, not {' and '.join(found)}"
        for name, found in values.items()
        if len(found) > 1
    ]
    outs = [str(Path(run.out).absolute()) for run in runs]
    problems += [
        f"two runs have the folder {out}; give each its own out"
        for out in sorted({o for o in outs if outs.count(o) > 1})
    ]
    if any(run.trains_base for run in runs):
        problems.append("method 'full' trains the base itself, which the runs share; train it alone")
    if any(run.cache_frozen for run in runs):
        problems.append(
            "cache_frozen cannot be: the runs have different windows in one pass; train them alone, or leave it out"
        )
    if asked := sorted({run.compile for run in runs} & {"on", "graphs"}):
        problems.append(f"compile={asked[0]!r} cannot be: runs that are trained together are not compiled")
    if problems:
        raise ConfigError("\n".join(problems))
