"""Finds the processes that hang, after an exchange has timed out in the others.

Every process whose exchange failed signs the list in the store of torch.distributed. The missing ones hang.
"""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

PAUSE = 0.05  # seconds between two looks at the list


def missing(rank: int, size: int, seconds: float) -> list[int]:
    """Signs the list, and returns the processes that do not sign it within so many seconds.

    Returns [0] if the list itself does not answer: process 0 holds it, unless the launcher does.
    """
    found = [0]
    caller = threading.Thread(target=_call, args=(rank, size, seconds, found), daemon=True)
    caller.start()
    caller.join(seconds + 2)
    return found


def _call(rank: int, size: int, seconds: float, found: list[int]) -> None:
    """Keeps the missing processes in `found`, which a store that hangs or ends leaves unchanged."""
    store = dist.PrefixStore("veneer/roll call", dist.distributed_c10d._get_default_store())
    end = time.monotonic() + seconds
    try:
        store.set(str(rank), "here")
        while True:
            silent = [other for other in range(size) if not store.check([str(other)])]
            found[:] = silent
            if not silent or time.monotonic() > end:
                return
            time.sleep(PAUSE)
    except RuntimeError:
        return
