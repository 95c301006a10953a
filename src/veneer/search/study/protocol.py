"""The protocol of the study, fixed before any run; docs/study/protocol.md says the same in words.

The part on instructions, which runs when asked for, is in docs/study/instructions.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from veneer.search.compare import texts
from veneer.search.compare.settings import Comparison
from veneer.search.study import sources
from veneer.train.run import Run

LORA, HIGH, LOW = "lora", "lora:rank=64", "lora:rank=2"
DECAY, DROPOUT = "full:weight_decay=0.1", "full:attention_dropout=0.1"
BALANCED, MUON = "lora/balanced", "lora/lora-muon"  # adaptive ratios of the steps of A and B
CONTENDERS = (
    "full", DECAY, DROPOUT, LOW, LORA, HIGH, "lora-mlp", "lora-attention", "loraplus", BALANCED, MUON,
    "lorapro", "pissa", "olora", "loraga", "miss",
)  # fmt: skip
QUICK = ("full", DECAY, LOW, LORA, HIGH, "lora-mlp", "loraplus", "lorapro", "pissa")
INSTRUCTED = ("full", DECAY, DROPOUT, LOW, LORA, HIGH)
AST = "ast"  # instructions with exact answers
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


def instructions(size: Size, out: str) -> tuple[Run, Comparison]:
    """Returns the comparison of the part on instructions, and writes its texts."""
    folder = f"{out}/{AST}"
    files = sources.write(Path(folder) / texts.FOLDER, sources.rows())
    own = {"data": (files["train"],), "valid": (files["valid"],), "test": (files["test"],), "packing": False}
    run = Run(**{**size.run, "batch": 8, "length": 128, **own})
    return run, Comparison(out=folder, **{**size.comparison, "methods": INSTRUCTED})
