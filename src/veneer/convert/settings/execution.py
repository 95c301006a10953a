"""Translates settings of execution: gradient checkpointing, compiling, streaming and trackers."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.convert.settings.given import NOTHING, Given, Translation

TRACKERS = ("mlflow", "tensorboard", "trackio", "wandb")  # those of veneer.train.track
YES, NO = (True, "true"), (False, "false", *NOTHING)


def recomputed(given: Given, out: Translation, key: str) -> None:
    """Translates gradient checkpointing; variants of other programs become the plain one."""
    value = given.take(key)
    if value in NO:
        return
    out.settings["gradient_checkpointing"] = True
    if value not in YES:
        out.notes.append(f"{key} {value!r}: Veneer keeps the inputs of the blocks only")


def compiled(given: Given, out: Translation, key: str) -> None:
    """Translates torch.compile; a wish for it becomes `auto`, which compiles runs that are long enough."""
    value = given.take(key)
    if value in (False, "false"):
        out.settings["compile"] = "off"
    elif value not in NOTHING and value not in (*YES, "auto"):
        given.leave(key, "compile must be auto, on or off")


def streamed(given: Given, out: Translation, wanted: bool) -> None:
    """Translates streaming, which needs a number of steps."""
    if wanted and out.settings.get("steps"):
        out.settings["stream"] = True
    elif wanted:
        out.notes.append("data is read completely: streaming needs a number of steps; set stream and steps")


def tracked(given: Given, out: Translation, key: str) -> None:
    """Translates trackers; unsupported ones are listed as not carried."""
    value = given.take(key)
    names = [value] if isinstance(value, str) else list(value or [])
    track(out, [n for n in names if n in TRACKERS])
    if any(n not in (*TRACKERS, "none") for n in names):
        given.leave(key, f"unsupported tracker; supported: {', '.join(TRACKERS)}")


def track(out: Translation, names: Sequence[str]) -> None:
    """Sets these trackers."""
    if names:
        out.settings["track"] = tuple(names)
        out.notes.append(f"track: {', '.join(names)}; Veneer logs without a network")
