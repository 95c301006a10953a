"""Settings of evaluation, speed and output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from veneer.errors import option, suggest
from veneer.settings import Range, Settings, setting
from veneer.train.track import available as trackers

SPARE = "one must be left if the newest is damaged"
# Checks that allow= may turn off, each by name; the run's record says which were.
ALLOWED = {
    "ratio": "a ratio of LoRA+ below 1",
    "config": "resuming with other settings than the run began with",
    "data": "resuming with other texts than the run began with",
    "base": "resuming on another base model than the run began with",
}
# Checks of earlier releases that are settings now.
MOVED = {"truncate": ("overlong", "cut")}


@dataclass(frozen=True, kw_only=True)
class Evaluation(Settings):
    """Steps at which texts are measured, and how much of each."""

    PANEL = "Evaluation"

    eval_every: int | None = setting(
        None, "distance of evaluations; a fifth of the run unless given", unit="steps"
    )
    eval_windows: int | None = setting(
        None,
        "examples to evaluate of each text, evenly spaced: 512 tokens of text, or as much in rows; 0: all;"
        " 24 of a language model, all of other tasks unless given",
        unit="examples",
    )
    patience: int | None = setting(
        None, "evaluations without better valid text that end the training early", unit="evaluations"
    )
    samples: int = setting(
        0, "prompts of valid text to continue at every evaluation, into metrics.jsonl", unit="prompts"
    )

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range."""
        yield from Range("1 or more", ("eval_every", "patience"), 1).problems(self)
        yield from Range("0 or more", ("eval_windows", "samples"), 0).problems(self)


@dataclass(frozen=True, kw_only=True)
class Speed(Settings):
    """Choices between speed, memory and disk; no figure depends on them beyond rounding."""

    PANEL = "Speed and memory"

    compile: Literal["auto", "on", "off", "graphs"] = setting(
        "auto",
        "torch.compile blocks and loss: faster steps, a minute at the start. auto: in long runs;"
        " graphs: with CUDA graphs (not yet run on a GPU)",
    )
    gradient_checkpointing: bool = setting(
        False, "keep only each block's input and recompute the rest backward: less memory, a third more time"
    )
    shard: bool = setting(
        False, "divide the frozen blocks of the base among the processes of torchrun (FSDP2)"
    )
    stream_base: bool = setting(
        False, "leave the frozen base on disk and read one block at a time: memory of a block, slower steps"
    )
    cache_frozen: bool = setting(
        False,
        "cache on disk, in out, the hidden states below the first adapted block, computed once an example",
    )


@dataclass(frozen=True, kw_only=True)
class Place(Settings):
    """The folder of the run, and the files and trackers that it writes to."""

    PANEL = "Output"

    out: str = setting("runs/fit", "folder of the run")
    save_every: int | None = setting(
        None, "distance of checkpoints; as eval_every unless given", unit="steps"
    )
    keep: int = setting(3, "newest checkpoints to keep, beside the best one", unit="checkpoints")
    report: bool = setting(
        True, "measure the strength dial, the layers and samples at the end, and write report.html"
    )
    track: tuple[str, ...] = setting(
        (), f"trackers to log to, without a network; several with commas: {', '.join(trackers())}"
    )
    resume: bool = setting(False, "continue in out from the newest valid checkpoint, if any")
    allow: tuple[str, ...] = setting((), f"checks to turn off: {', '.join(ALLOWED)}")

    def __post_init__(self) -> None:
        given: Any = self.track  # not fitted to its type yet
        if isinstance(given, str | tuple | list):
            entries = [given] if isinstance(given, str) else given
            names = tuple(name for entry in entries for name in str(entry).split(","))
            object.__setattr__(self, "track", names)
        super().__post_init__()

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every unknown name and value out of range."""
        yield from Range("1 or more", ("save_every",), 1).problems(self)
        yield from Range("2 or more", ("keep",), 2, advice=SPARE).problems(self)
        for name in self.track:
            if name not in trackers():
                yield f"{option('track')}: unknown tracker {name!r}{suggest(name, trackers())}"
        for name in self.allow:
            if name not in ALLOWED:
                if name in MOVED:
                    now = option(*MOVED[name])
                    yield f"{option('allow')}: {name!r} is a setting of its own now; set {now}"
                else:
                    yield f"{option('allow')}: unknown check {name!r}{suggest(name, ALLOWED)}"
