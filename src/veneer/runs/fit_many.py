"""`fit_many`: several adapters of one base, trained side by side in one pass a step, each in its own run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from veneer import disk, tasks
from veneer.errors import ConfigError
from veneer.runs.finish import Begun, end
from veneer.runs.fit import begin, look, loop_of
from veneer.runs.prepare import NAME
from veneer.runs.shared import Shared
from veneer.tasks.base.abilities import Joint
from veneer.train.folder import layout
from veneer.train.folder.result import Result
from veneer.train.loop import together
from veneer.train.loop.progress import Voice
from veneer.train.loop.signals import listening
from veneer.train.loop.state import Position
from veneer.train.run import Run

SHARED = ("model", "task", "precision", "quantise", "device", "gradient_checkpointing")


def fit_many(runs: Sequence[Run], *, progress: bool = True) -> list[Result]:
    """Trains all runs at once and returns their results in order; each has a folder as `fit` writes it.

    The runs share one base in memory and one pass through it for all batches; data, method, rank, rate,
    optimiser and length may differ. Every adapter learns what it would alone, up to rounding; nothing is
    compiled. Raises ConfigError, before any training, for runs that do not fit together and methods without a
    normal form, and the errors of `fit` for any run, with all of them saved.
    """
    found = fit_many_until(runs, None, progress=progress)
    return [f for f in found if isinstance(f, Result)]


def fit_many_until(
    runs: Sequence[Run], step: int | None, *, progress: bool = False, shared: Shared | None = None
) -> list[Result | Position]:
    """Trains as `fit_many` up to a step and saves there; see `fit_until`. step: None for all of them."""
    _check(runs)
    kept = shared or Shared()
    with disk.written(Path(runs[0].out)), ExitStack() as stack:
        voices = [Voice(progress) for _ in runs]
        readies = [
            look(replace(run, compile="off"), voice, stack, shared=kept if shared or _fresh(run) else None)
            for run, voice in zip(runs, voices, strict=True)
        ]
        together.share_base([ready.model for ready in readies])
        together.check({ready.run.out: ready.model for ready in readies}, NAME)
        opened = [begin(ready, voice, stack) for ready, voice in zip(readies, voices, strict=True)]
        going = [b for b in opened if isinstance(b, Begun)]
        ended = iter(_train(going, stack, step, kept) if going else [])
        return [b if isinstance(b, Result) else next(ended) for b in opened]


def _train(
    going: Sequence[Begun], stack: ExitStack, until: int | None, shared: Shared
) -> list[Result | Position]:
    bank = together.carry([b.ready.model for b in going], NAME)
    loops, wish = [loop_of(b, shared) for b in going], stack.enter_context(listening())
    for loop in loops:
        loop.until = until
    positions = together.run_together(loops, bank, wish)
    return [
        position if loop.paused() else end(b, loop, position, wish)
        for b, loop, position in zip(going, loops, positions, strict=True)
    ]


def _fresh(run: Run) -> bool:
    """Returns True unless the run goes on, which may read as its own beginning did."""
    return not (Path(run.out) / layout.CONFIG).exists()


def _check(runs: Sequence[Run]) -> None:
    """Raises ConfigError for all reasons against training these runs together."""
    if not runs:
        raise ConfigError("runs must be a list with a run or more, got none")
    values = {name: sorted({str(getattr(run, name)) for run in runs}) for name in SHARED}
    problems = [
        f"{name} must be the same for all runs, got {' and '.join(found)}"
        for name, found in values.items()
        if len(found) > 1
    ]
    outs = [str(Path(run.out).absolute()) for run in runs]
    problems += [
        f"out must differ between runs, got {out} twice; give each its own"
        for out in sorted({o for o in outs if outs.count(o) > 1})
    ]
    if any(run.trains_base for run in runs):
        problems.append("method 'full' trains the base, which the runs share; train it alone")
    unfit = sorted({run.task for run in runs if not issubclass(tasks.get(run.task), Joint)})
    problems += [f"task {name!r} has no joint training; train its runs alone" for name in unfit]
    if any(run.cache_frozen for run in runs):
        problems.append(
            "cache_frozen needs one run a pass, and here all share it; train them alone, or leave it out"
        )
    if any(run.neftune for run in runs):
        problems.append(
            "neftune changes embeddings, which all runs share here; train them alone, or leave it out"
        )
    if any(run.add_tokens for run in runs):
        problems.append("add_tokens changes the vocabulary, which all runs share here; train them alone")
    if any(run.attention_dropout for run in runs):
        problems.append("attention_dropout acts on the rows of all runs; train them alone, or leave it out")
    if asked := sorted({run.compile for run in runs} & {"on", "graphs"}):
        problems.append(f"compile must be 'off' or 'auto' for runs trained together, got {asked[0]!r}")
    if problems:
        raise ConfigError("\n".join(problems))
