"""Runs in the processes of tiny.start; the fork server imports it once, so that a training costs no
imports."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (the imports that cost most)
from torch._guards import CompileContext, CompileId, compile_context
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from veneer import signals
from veneer.errors import VeneerError
from veneer.runs.fit import fit
from veneer.train.loop.step import Learner
from veneer.train.run import Run
from veneer.train.speed.compiling import Shapes


def train(
    given: dict[str, Any],
    signal_at: tuple[int, int] | None,
    then: int,
    compiling: bool,
    die_after: float,
    threads: int,
) -> None:
    """Exits as the command line does; the message of an error goes to stderr."""
    torch.set_num_threads(threads)  # as many as the parent: sums depend on it
    signals.at_once()
    _arm(signal_at, then, compiling, die_after)
    try:
        fit(Run.from_dict(given), progress=False)
    except signals.Stopped as e:
        sys.exit(e.exit_code)
    except VeneerError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)


def _arm(signal_at: tuple[int, int] | None, then: int, compiling: bool, die_after: float) -> None:
    at, number = signal_at or (0, 0)
    real, steps = Learner.step, iter(range(1, 1 << 30))

    def step(self: Learner, *args: Any) -> Any:
        n = next(steps)
        if n == 1:
            signal.setitimer(
                signal.ITIMER_REAL, die_after
            )  # SIGALRM kills a process that does not ask for it
        if n == at and compiling:
            torch.rand(3)  # a part of the step
            with compile_context(CompileContext(CompileId(frame_id=0, frame_compile_id=0))):
                os.kill(os.getpid(), number)
        outcome = real(self, *args)
        if n == at:
            os.kill(os.getpid(), number)
            if then:
                os.kill(os.getpid(), then)
        return outcome

    Learner.step = step  # type: ignore[method-assign]
    if compiling:  # the shapes of a compiled training, which this one is not
        make, shapes = Learner.__new__, Shapes(1 << 20, ())

        def with_shapes(cls: Any, *args: Any, **given: Any) -> Any:
            return make(cls, *args, **{**given, "shapes": shapes})

        Learner.__new__ = with_shapes  # type: ignore[method-assign, assignment]
