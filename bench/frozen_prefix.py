"""Times a LoRA step with the top 2 of 8 blocks adapted, with and without cached hidden states.

Compiled, h512 in bfloat16, 4 x 256, with 8k and 32k tokens, of which the head takes its time whatever is
adapted. Figures: tokens/s over those of all 8 adapted, and over those of the top 2 computed whole.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import _measure as m
import torch
from torch import Tensor

import veneer
from veneer.data.pack import Segment, Window
from veneer.train.speed import frozen_blocks
from veneer.train.speed.compiling import prepare
from veneer.train.speed.frozen_cache import Kept

ROWS, LENGTH = 4, 256
VOCABULARIES = {"8k": 8000, "32k": 32000}
UPPER = r".*layers\.[67]\..*"


def make(
    vocabulary: int, to: str, batch: dict[str, Tensor], windows: list[Window], out: Path | None
) -> m.Step:
    """Times one step with these layers adapted; out: folder of the cache, None: no cache."""
    model = veneer.attach(
        m.llama("h512", vocabulary, torch.bfloat16), "lora", to=to, rank=m.RANK, alpha=m.ALPHA
    )
    kept = None
    if out:
        task, (_, t) = m.language_task(), batch["input_ids"].shape
        prefix = frozen_blocks.look(model, {"input_ids": batch["input_ids"][:1], "use_cache": False}, t)
        kept = Kept(model, prefix, task, windows, out, {})
    objective, adam = prepare(model, m.language_task(), batch, compiled=True), m.optimiser(model, fused=True)

    def whole() -> float:
        return m.our_step(model, objective, adam, batch).item()

    def upper() -> float:
        with kept.passing(windows, LENGTH):
            return whole()

    return upper if kept else whole


def main() -> None:
    figures = {}
    for name, vocabulary in VOCABULARIES.items():
        torch._dynamo.reset()
        batch = m.shifted(m.random_batch(ROWS, LENGTH, vocabulary))
        ones = torch.ones(LENGTH, dtype=torch.int64)
        windows = [
            (Segment(ids, labels, ones),)
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        ]
        with tempfile.TemporaryDirectory() as folder:
            ways = {"all": ("all-linear", None), "top2": (UPPER, None), "kept": (UPPER, Path(folder))}
            steps = {way: make(vocabulary, to, batch, windows, out) for way, (to, out) in ways.items()}
            losses = {way: round(step(), 4) for way, step in steps.items()}
            seconds = m.interleaved(steps)
        print(
            name,
            {k: f"{1000 * v:.0f} ms" for k, v in seconds.items()},
            "first losses",
            losses,
            file=sys.stderr,
        )
        figures |= {f"{way}_vs_all_{name}": seconds["all"] / seconds[way] for way in ("top2", "kept")}
        figures[f"kept_vs_top2_{name}"] = seconds["top2"] / seconds["kept"]
    m.report("frozen_prefix", figures)


if __name__ == "__main__":
    main()
