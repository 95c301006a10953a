"""The protocol of the study, fixed before any run; docs/study/protocol.md says the same in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from veneer.search.compare.settings import Comparison
from veneer.train.run import Run

LORA, HIGH, LOW = "lora", "lora:rank=64", "lora:rank=2"
DECAY = "full:weight_decay=0.1"
CONTENDERS = (
    "full", DECAY, LOW, LORA, HIGH, "lora-mlp", "lora-attention", "loraplus", "lorapro",
    "pissa", "olora", "loraga", "miss", "oft",
)  # fmt: skip
QUICK = ("full", DECAY, LOW, LORA, HIGH, "lora-mlp", "loraplus", "lorapro", "pissa")
NEAR, FAR = "prose", "c"  # texts near the pretraining data, and far from it


class Size(NamedTuple):
    """The size of a study: settings of each run and of each comparison."""

    run: Mapping[str, Any]
    comparison: Mapping[str, Any]


SHARED = {"model": "builtin", "batch": 4, "precision": "fp32", "compile": "off", "device": "cpu"}
QUICKLY = Size(
    {**SHARED, "steps": 32, "length": 128, "eval_windows": 4},
    {"methods": QUICK, "seeds": 3, "durations": (0.25, 0.5)},
)
FULLY = Size(
    {**SHARED, "steps": 128, "length": 256, "eval_windows": 8},
    {"methods": CONTENDERS, "seeds": 4, "durations": (0.25, 0.5)},
)


def parts(size: Size, out: str) -> dict[str, tuple[Run, Comparison]]:
    """Returns the comparison of every part of the study, by name."""
    return {
        text: (Run(data=(f"builtin:{text}",), **size.run), Comparison(out=f"{out}/{text}", **size.comparison))
        for text in (NEAR, FAR)
    }
