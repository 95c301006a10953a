"""How a training is carried out, which all programs can say: what is kept for the backward, compiled, streamed and shown elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.convert.settings.given import NOTHING, Given, Translation

TRACKERS = ("mlflow", "tensorboard", "trackio", "wandb")  # as of veneer.train.track
YES, NO = (True, "true"), (False, "false", *NOTHING)


def recomputed(given: Given, out: Translation, key: str) -> None:
    """Whether blocks are computed again in the backward; another program's own ways of it are done in the plain one."""
    value = given.take(key)
    if value in NO:
        return
    out.settings["gradient_checkpointing"] = True
    if value not in YES:
        out.notes.append(f"{key} {value!r}: only what enters each block is kept here")


def compiled(given: Given, out: Translation, key: str) -> None:
    """torch.compile: where it is wanted, `auto` decides whether a run is long enough for it."""
    value = given.take(key)
    if value in (False, "false"):
        out.settings["compile"] = "off"
    elif value not in NOTHING and value not in (*YES, "auto"):
        given.leave(key, "compile is auto, on or off here")


def streamed(given: Given, out: Translation, wanted: bool) -> None:
    """Reading data while it is learned, which needs a number of steps."""
    if wanted and out.settings.get("steps"):
        out.settings["stream"] = True
    elif wanted:
        out.notes.append(
            "data is read as a whole: streaming needs a number of steps, which the file does not have; set stream and steps"
        )


def tracked(given: Given, out: Translation, key: str) -> None:
    """Where figures are shown too; programs that are not here are left."""
    value = given.take(key)
    names = [value] if isinstance(value, str) else list(value or [])
    track(out, [n for n in names if n in TRACKERS])
    if any(n not in (*TRACKERS, "none") for n in names):
        given.leave(key, f"not shown there from here; {', '.join(TRACKERS)} are trackers here")


def track(out: Translation, names: Sequence[str]) -> None:
    """Shows figures in these trackers."""
    if names:
        out.settings["track"] = tuple(names)
        out.notes.append(f"track: {', '.join(names)} without a network here")
