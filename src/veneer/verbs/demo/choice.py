"""`veneer demo`: the built-in model in three ways, or a chat model on answers that are right or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer import embedded
from veneer.verbs.demo import chat
from veneer.verbs.demo import demo as builtin


def demo(
    out: str = "runs/demo",
    *,
    model: str = embedded.PREFIX,
    steps: int = 100,
    seed: int = 0,
    fresh: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains every method on every text that this interpreter has, or a chat model on messages to a bank.

    out: folder of the demo; trainings that are finished there are not repeated, one that was stopped goes on
    model: builtin; or a chat model that learns the intents of a bank's customers: smollm2, a folder or Hub id
    steps: length of each training, 1,024 tokens a step of the built-in model and 256 of another
    seed: decides starts and order
    fresh: remove what an earlier demo left in `out` and begin anew
    """
    if model == embedded.PREFIX:
        return builtin.demo(out, steps=steps, seed=seed, fresh=fresh, progress=progress)
    return chat.demo(out, model, steps=steps, seed=seed, fresh=fresh, progress=progress)


def text(results: Mapping[str, Any]) -> str:
    """Returns the result of a demo for people."""
    return chat.text(results) if "right_after" in results else builtin.text(results)
