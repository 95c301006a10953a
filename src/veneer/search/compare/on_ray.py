"""Compares in tasks of Ray: each is one of several processes on the journal of the comparison's folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from typing import Any, TextIO, cast

from veneer.errors import VeneerError
from veneer.runs.on_ray import cluster
from veneer.runs.on_ray.worker import Desk, Lines, rebuilt
from veneer.search.compare.settings import Comparison
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

LOOK = 0.5  # seconds between two looks at the tasks' lines
RESTARTS = 2  # times that a task begins again whose process was lost


def compare_in_tasks(
    compare: Callable[..., Any],
    run: Run,
    comparison: Comparison,
    forecasts: Mapping[str, Mapping[str, float]] | None,
    voice: Voice,
) -> None:
    """Ends when every task has seen the whole table. compare: the comparison in one process.

    A task whose process is lost begins again and goes on with the journal. Raises ConfigError, the errors of
    the tasks, and VeneerError if a task was lost too often.
    """
    ray = cluster.module()
    own = replace(comparison, engine="optuna", workers=None)
    with cluster.joined(ray):
        n, on_gpu = cluster.places(ray, run, comparison.workers)
        desk = ray.remote(num_cpus=0)(Desk).remote()
        task = ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_retries=RESTARTS)(_work)
        voice.tell(f"Ray starts {n} task{'s' if n > 1 else ''}")
        given = (compare, run, own, forecasts, voice.aloud, desk, os.getcwd())
        _followed(ray, [task.remote(*given) for _ in range(n)], desk, voice)


def _followed(ray: Any, tasks: Sequence[Any], desk: Any, voice: Voice) -> None:
    going = list(tasks)
    while going:
        ended, going = ray.wait(going, timeout=LOOK)
        for line in ray.get(desk.news.remote())[0]:
            voice.tell(line)
        try:
            errors = [error for error in ray.get(ended) if error is not None]
        except ray.exceptions.RayError as e:
            last = str(e).strip().splitlines()[-1].strip()
            raise VeneerError(
                f"a task of Ray was lost {RESTARTS + 1} times: {last}; repeat the command"
            ) from e
        if errors:
            raise rebuilt(*errors[0])


def _work(
    compare: Callable[..., Any],
    run: Run,
    comparison: Comparison,
    forecasts: Mapping[str, Mapping[str, float]] | None,
    progress: bool,
    desk: Any,
    folder: str,
) -> tuple[type[VeneerError], tuple[Any, ...], dict[str, Any]] | None:
    """Compares beside the other tasks; returns the parts of an error, which no new start would cure."""
    with suppress(OSError):  # a machine without the driver's directory: paths must be absolute
        os.chdir(folder)
    try:
        with redirect_stderr(cast(TextIO, Lines(desk))):
            compare(run, comparison, forecasts=forecasts, progress=progress)
    except VeneerError as e:
        return type(e), e.args, e.__dict__
    return None
