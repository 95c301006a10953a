"""Runs in the processes of tiny.start; the fork server imports it once, so that a training costs no
imports."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (the imports that cost most)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from veneer import signals
from veneer.errors import VeneerError
from veneer.runs.fit import fit
from veneer.train.loop.step import Learner
from veneer.train.run import Run


def train(given: dict[str, Any], signal_at: tuple[int, int] | None, die_after: float, threads: int) -> None:
    """Exits as the command line does; the message of an error goes to stderr."""
    torch.set_num_threads(threads)  # as many as the parent: sums depend on it
    signals.at_once()
    _arm(signal_at, die_after)
    try:
        fit(Run.from_dict(given), progress=False)
    except signals.Stopped as e:
        sys.exit(e.exit_code)
    except VeneerError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)


def _arm(signal_at: tuple[int, int] | None, die_after: float) -> None:
    at, number = signal_at or (0, 0)
    real, steps = Learner.step, iter(range(1, 1 << 30))

    def step(self: Learner, *args: Any) -> Any:
        n = next(steps)
        if n == 1:
            signal.setitimer(
                signal.ITIMER_REAL, die_after
            )  # SIGALRM kills a process that does not ask for it
        outcome = real(self, *args)
        if n == at:
            os.kill(os.getpid(), number)
        return outcome

    Learner.step = step  # type: ignore[method-assign]
