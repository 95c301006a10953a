"""Settings that studies of LoRA recommend, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from veneer import embedded
from veneer.errors import ConfigError, suggest
from veneer.train import rates
from veneer.train.run import Run

TIMES_FULL = 10  # both studies: the best rate of LoRA over that of full fine-tuning


class Recipe(NamedTuple):
    """A study's advice. source: its title; settings: of a run, without the rate; reasons: by what is set."""

    source: str
    settings: Mapping[str, Any]
    reasons: Mapping[str, str]


RATE = f"{TIMES_FULL} times full fine-tuning's"
LAYERS = "all linear layers, as attention alone learns less at equal size"
RECIPES = {
    "learns-less": Recipe(
        "LoRA Learns Less and Forgets Less (arXiv 2405.09673)",
        {
            "method": "lora",
            "options": {"rank": 256, "alpha": 512, "dropout": 0.05},
            "epochs": 4,
            "schedule": "cosine",
            "warmup": 0.1,
        },
        {
            "layers": LAYERS,
            "rank": "256, the highest of the study; take less where memory is short",
            "alpha": "twice the rank, as fewer intruder dimensions appear",
            "rate": RATE,
            "epochs": "4: low ranks need more passes than full fine-tuning",
        },
    ),
    "without-regret": Recipe(
        "LoRA Without Regret (Thinking Machines, 2025)",
        {
            "method": "lora",
            "options": {"rank": 64, "alpha": 32},
            "batch": 8,
            "schedule": "constant",
            "warmup": 0,
        },
        {
            "layers": LAYERS,
            "rank": "64; each parameter holds about 2 bits, so count the bits of the data",
            "alpha": "32 at every rank, so that the best rate hardly depends on the rank",
            "rate": RATE,
            "batch": "8, as large batches cost LoRA more than full fine-tuning",
        },
    ),
}


def applied(name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns the given settings filled up by a recipe, and its reasons in one sentence.

    What is given stays; an alpha of twice the rank follows a given rank. Raises ConfigError for an unknown
    recipe and for a method other than LoRA.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}{suggest(name, RECIPES)}")
    source, settings, reasons = RECIPES[name]
    if given.get("method", "lora") != "lora":
        raise ConfigError(f"the recipe {name!r} is for LoRA, got method {given['method']!r}; leave one out")
    options = {**settings["options"], **_following(settings["options"], given)}
    length = {"epochs"} if {"steps", "epochs"} & given.keys() else set()
    kept = {k: v for k, v in settings.items() if k not in length}
    found = {**kept, "lr": _rate(given), **given, "options": {**options, **dict(given.get("options", {}))}}
    told = "; ".join(f"{what}: {why}" for what, why in reasons.items() if what not in length)
    return found, f"{source}: {told}"


def _following(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    rank = dict(given.get("options", {})).get("rank")
    return {"alpha": 2 * rank} if rank is not None and options["alpha"] == 2 * options["rank"] else {}


def _rate(given: Mapping[str, Any]) -> float:
    builtin = given.get("model", Run.model) == embedded.PREFIX
    return TIMES_FULL * rates.default("full", "adamw", builtin)
