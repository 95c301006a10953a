"""Trainings in processes as a launcher starts them; one can be killed, stopped, signalled or given a NaN.

The processes are forked from one that has imported everything: torchrun itself takes seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support import tiny

SECONDS = 300  # of all processes; a busy machine needs many


class Fault(NamedTuple):
    """At the end of its n-th step, process `rank` gets the signal. within: before its gradient is joined.

    seconds: instead, after so many seconds of training.
    """

    rank: int
    number: int
    step: int = 0
    within: bool = False
    seconds: float = 0.0


class Ended(NamedTuple):
    """The end of a process. code: negative for a signal; said: on stderr; seconds: since the start of all."""

    code: int
    said: str
    seconds: float


def launch(
    given: dict[str, Any],
    size: int = 2,
    *,
    fault: Fault | None = None,
    timeout: float = 60.0,
    restarts: int = 0,
) -> list[Ended]:
    """Trains in `size` processes; a stopped one is killed once the others have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = [Path(f"{given['out']}.{rank}.err") for rank in range(size)]
    begun = time.monotonic()
    processes = [
        tiny._forks().Process(
            target=_train, args=(given, rank, size, port, str(said[rank]), fault, timeout, restarts)
        )
        for rank in range(size)
    ]
    for p in processes:
        p.start()
    ends = [0.0] * size
    hung = {fault.rank} if fault and fault.number == signal.SIGSTOP else set()
    while waiting := [r for r, p in enumerate(processes) if p.is_alive() and r not in hung]:
        if time.monotonic() - begun > SECONDS:
            for p in processes:
                p.kill()
            sys.exit(f"processes {waiting} did not end")
        time.sleep(0.02)
        for rank in waiting:
            if not processes[rank].is_alive():
                ends[rank] = time.monotonic() - begun
    for rank in hung:
        processes[rank].kill()
    for p in processes:
        p.join()
    return [
        Ended(int(p.exitcode or 0), f.read_text(), t) for p, f, t in zip(processes, said, ends, strict=True)
    ]


def _train(
    given: dict[str, Any],
    rank: int,
    size: int,
    port: int,
    said: str,
    fault: Fault | None,
    timeout: float,
    restarts: int,
) -> None:
    """Ends as the command line does."""
    from veneer import signals
    from veneer.errors import VeneerError
    from veneer.runs.fit import fit
    from veneer.train import group
    from veneer.train.run import Run

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(restarts)}
    torch.set_num_threads(1)
    group.STEP = timeout
    with open(said, "w") as f:
        os.dup2(f.fileno(), 2)
    signals.at_once()
    if fault is not None and fault.rank == rank:
        _arm(fault)
    try:
        fit(Run.from_dict(given), progress=False)
    except signals.Stopped as e:
        sys.exit(e.exit_code)
    except VeneerError as e:
        print(e, file=sys.stderr, flush=True)
        os._exit(e.exit_code)  # without the interpreter's end, which a lost group may hold up


def _arm(fault: Fault) -> None:
    from veneer.train.loop.step import Learner

    step, finish, counts = Learner.step, Learner.finish, {"steps": 0}

    def stepping(self: Learner, *args: Any) -> Any:
        counts["steps"] += 1
        if counts["steps"] == 1 and fault.seconds:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), fault.number))
            signal.setitimer(signal.ITIMER_REAL, fault.seconds)
        outcome = step(self, *args)
        if counts["steps"] == fault.step and not fault.within:
            os.kill(os.getpid(), fault.number)
        return outcome

    def finishing(self: Learner, *args: Any) -> Any:
        if counts["steps"] == fault.step and fault.within:
            os.kill(os.getpid(), fault.number)
        return finish(self, *args)

    Learner.step, Learner.finish = stepping, finishing  # type: ignore[method-assign]
