"""Reads from the environment which of a launcher's processes this is; torchrun sets these variables."""

from __future__ import annotations

import os
from typing import NamedTuple

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launched(NamedTuple):
    """One process of a launcher: `rank` of `size`, and `local` among those of its machine.

    restarts: times that the launcher has started all processes again.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    restarts: int = 0

    @property
    def first(self) -> bool:
        """Tells if this is the process that speaks."""
        return self.rank == 0


def launched() -> Launched:
    """Returns this process' place among those of torchrun, or of one process without a launcher."""
    if not all(name in os.environ for name in NEEDED):
        return Launched()
    rank, size = (int(os.environ[name]) for name in NEEDED[:2])
    local = int(os.environ.get("LOCAL_RANK", rank))
    return Launched(rank, size, local, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
