"""The protocol of the study, fixed before any run; docs/study/protocol.md says the same in words.

Two parts run when asked for: instructions (docs/study/instructions.md), and a repetition on real weights
(docs/study/confirming.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from veneer.models.short_names import SMOLLM2, place
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
CONFIRMED = ("full", LOW, LORA, HIGH, "lora-mlp", "loraplus")
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
# 64 instructions a training: 135 million parameters take 1.4 s for a step of LoRA on one thread, 2 s in full.
CONFIRMING = Size(
    {**SHARED, "steps": 16, "length": 64, "eval_windows": 1, "packing": False, "known": ("builtin:known",)},
    {
        "methods": CONFIRMED,
        "seeds": 3,
        "durations": (0.25, 0.5),
        "centre": {"full": 1e-4, **dict.fromkeys((LOW, LORA, HIGH, "lora-mlp"), 1e-3), "loraplus": 2.5e-4},
    },
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
    run = Run(**{**size.run, "batch": 8, "length": 128, **_rows(folder), "packing": False})
    return run, Comparison(out=folder, **{**size.comparison, "methods": INSTRUCTED})


def confirming(out: str) -> tuple[Run, Comparison]:
    """Returns the comparison on SmolLM2, and writes its texts."""
    folder = f"{out}/{SMOLLM2}"
    run = Run(**{**CONFIRMING.run, **_rows(folder), "model": place(SMOLLM2)})
    return run, Comparison(out=folder, **CONFIRMING.comparison)


def _rows(folder: str) -> dict[str, tuple[str, ...]]:
    """Writes the rows of instructions and returns their files as settings of a run."""
    files = sources.write(Path(folder) / texts.FOLDER, sources.rows())
    return {"data": (files["train"],), "valid": (files["valid"],), "test": (files["test"],)}
