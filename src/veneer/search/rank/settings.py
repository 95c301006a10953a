"""Settings of a search for the rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from veneer.errors import option
from veneer.search.decide import grid, plateau
from veneer.settings import Range, Settings, setting


@dataclass(frozen=True, kw_only=True)
class RankSearch(Settings):
    """The form, the ranks and the limits of a search for the rank."""

    PANEL = "Method"

    form: Literal["pilot", "sweep", "gradient"] = setting(
        "pilot",
        "pilot: one training at a high rank, cut to every smaller one; sweep: a training for each rank, then"
        " each group of layers; gradient: no training, ranks of layers by the loss's gradient (GoRA)",
    )
    most: int = setting(64, "highest rank")
    share: float = setting(1.0, "length of the pilot, as a share of the steps")
    rates: int = setting(grid.FEWEST, "learning rates that a sweep tunes once, by factors of two")
    seeds: int = setting(2, "seeds of each rank of a sweep", unit="seeds")
    tolerance: float = setting(plateau.TOLERANCE, "share of the score that a doubling must gain")
    max_cost: float | None = setting(None, "most work of a sweep after its rate", unit="full trainings")
    widen: bool = setting(True, "sweep: compare attention, MLP and all linear layers at the rank found")
    together: int = setting(8, "most trials in one pass, where that is faster; 1: never", unit="trials")
    out: str = setting("runs/rank", "folder of the search; the same command goes on with it")

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range."""
        yield from Range("2 or more", ("most",), 2).problems(self)
        yield from Range(f"{grid.FEWEST} or more", ("rates",), grid.FEWEST).problems(self)
        yield from Range("1 or more", ("seeds", "together"), 1).problems(self)
        yield from Range("above 0 and below 1", ("tolerance",), 0, 1, open=True).problems(self)
        yield from Range("above 0 and at most 1", ("share",), 0, 1 + 1e-12, open=True).problems(self)
        yield from Range("above 0", ("max_cost",), 0, open=True).problems(self)
        if self.form == "sweep" and self.seeds < 2:
            yield f"{option('seeds')} must be 2 or more to know the noise of a sweep, got {self.seeds}"

    @property
    def ranks(self) -> list[int]:
        """Returns 1, 2, 4, .. up to the highest rank, which is the last."""
        found = [1]
        while found[-1] * 2 < self.most:
            found.append(found[-1] * 2)
        return [*found, self.most]
