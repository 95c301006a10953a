"""Settings of a comparison, beside those of the run that its trials share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.errors import ConfigError, option
from veneer.search.compare import contenders
from veneer.search.decide import grid
from veneer.settings import Range, Settings, about, setting


@dataclass(frozen=True, kw_only=True)
class Comparison(Settings):
    """The contenders, their rates and seeds, and how trials run."""

    PANEL = "Method"

    methods: tuple[str, ...] = setting(
        contenders.DEFAULT,
        f"contenders: {', '.join(contenders.known())}, METHOD/OPTIMISER or NAME:rank=16; several with commas",
    )
    rates: int = setting(grid.FEWEST, "learning rates of each contender, by factors of two around its centre")
    centre: dict[str, float] = field(
        default_factory=dict, metadata=about("middle rate by contender, in place of its default")
    )
    seeds: int = setting(3, "seeds at the chosen rate", unit="seeds")
    durations: tuple[float, float] = setting(
        (0.25, 0.5), "shorter trainings for the front of learning and forgetting, as shares of the steps"
    )
    together: int = setting(
        8, "most trials in one pass, where that was measured to be faster; 1: never", unit="trials"
    )
    engine: Literal["optuna", "ray"] = setting(
        "optuna", "processes that train. optuna: this one; ray: tasks of Ray on one journal"
    )
    workers: int | None = setting(
        None, "tasks of engine ray, with a CPU or GPU each; one for each GPU unless given", unit="tasks"
    )
    out: str = setting("runs/compare", "folder of the comparison; the same command goes on with it")

    def __post_init__(self) -> None:
        given: Any = self.methods  # not fitted to its type yet
        if isinstance(given, str | tuple | list):
            entries = [given] if isinstance(given, str) else given
            names = tuple(n.strip() for entry in entries for n in str(entry).split(",") if n.strip())
            object.__setattr__(self, "methods", tuple(dict.fromkeys(names)))
        super().__post_init__()

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range."""
        yield from Range(f"{grid.FEWEST} or more", ("rates",), grid.FEWEST).problems(self)
        yield from Range("1 or more", ("seeds", "together"), 1).problems(self)
        if not all(0 < share < 1 for share in self.durations):
            yield f"{option('durations')} must be between 0 and 1, got {self.durations}"
        if not self.methods:
            yield f"{option('methods')} must name a contender, got none"
        for label in self.centre:
            if label not in self.methods:
                yield f"{option('centre')}: {label!r} is not compared; add it to {option('methods')}"
        if self.workers is not None and self.engine != "ray":
            yield f"{option('workers', self.workers)} needs {option('engine', 'ray')}"

    def grids(self, runs: dict[str, Any]) -> dict[str, list[float]]:
        """Returns the rates of every contender. Raises one ConfigError for all without a known rate."""
        found, problems = {}, []
        for label, run in runs.items():
            try:
                found[label] = grid.around(self.centre.get(label) or contenders.centre(run), self.rates)
            except ConfigError as e:
                problems.append(e.text)
        if problems:
            raise ConfigError("\n".join(problems))
        return found
