"""Opens a part of the launcher's store that only this start of the processes uses.

torchrun keeps one store over all restarts. PyTorch 2.13 may read from it the addresses of processes that have
ended, and waits for them. The count of restarts does not help: on several machines each counts its own.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from veneer.errors import VeneerError

PAUSE = 0.01  # seconds between two looks at the store


class Absent(VeneerError):
    """Processes of the launcher did not start."""


def own_part(store: dist.Store, rank: int, size: int, seconds: float) -> dist.Store:
    """Returns the same fresh part of the store in all processes, once all are here.

    Every process greets with a new word, process 0 answers it with the name of the part, and the process
    confirms; answers to words of an earlier start are never read. Raises Absent after so many seconds.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        _answer(store, word, size, time.monotonic() + seconds)
        return dist.PrefixStore(f"veneer/{word}", store)
    store.set(f"veneer/word/{rank}", word)
    answer = f"veneer/answer/{word}"
    try:
        store.wait([answer], timedelta(seconds=seconds))
    except RuntimeError as e:
        raise Absent(
            f"process {rank} of {size}: process 0 did not start within {seconds:g} s; see its log"
        ) from e
    name = store.get(answer).decode()
    store.set(f"veneer/{name}/here/{rank}", "")
    return dist.PrefixStore(f"veneer/{name}", store)


def _answer(store: dist.Store, name: str, size: int, end: float) -> None:
    """Answers every word that is there, old ones too, until all processes have confirmed."""
    missing = list(range(1, size))
    while missing := [rank for rank in missing if not store.check([f"veneer/{name}/here/{rank}"])]:
        for rank in missing:
            if store.check([f"veneer/word/{rank}"]):
                store.set(f"veneer/answer/{store.get(f'veneer/word/{rank}').decode()}", name)
        if time.monotonic() > end:
            raise Absent(
                f"process 0 of {size}: process {', '.join(map(str, missing))} did not start; see its log"
            )
        time.sleep(PAUSE)
