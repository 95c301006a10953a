"""Times a LoRA step on windows of short documents: attention by boundaries against a mask.

h512 with 8k tokens, 2048 tokens a step in windows of 512 and 1024, not compiled; in float32 and bfloat16, and
compiled in bfloat16 for 1024. Figures: time with transformers' mask over time with boundaries, of the whole
step.
"""

from __future__ import annotations

import sys

import _measure as m
import torch
from torch import Tensor

from veneer.data.pack import Segment, Window, collate, pack
from veneer.train.speed import fast_attention
from veneer.train.speed.compiling import prepare

TOKENS, VOCABULARY = 2048, 8000
WAYS = [(512, torch.float32, False), (1024, torch.float32, False)]
WAYS += [(512, torch.bfloat16, False), (1024, torch.bfloat16, False), (1024, torch.bfloat16, True)]


def windows(length: int) -> list[Window]:
    """As many windows as hold TOKENS."""
    draw = torch.Generator().manual_seed(0)
    sizes = (110 * torch.exp(0.8 * torch.randn(400, generator=draw))).round().clamp(8, length).long().tolist()
    ids = [torch.randint(0, VOCABULARY, (n,), generator=draw) for n in sizes]
    return pack((Segment(i, i, torch.ones_like(i)) for i in ids), length)[: TOKENS // length]


def make(
    length: int, dtype: torch.dtype, compiled: bool, batch: dict[str, Tensor], *, boundaries: bool
) -> m.Step:
    """Returns one step, with boundaries or with transformers' mask."""
    model = m.veneer_model(m.llama("h512", VOCABULARY, dtype))
    objective, adam = (
        prepare(model, m.language_task(), batch, compiled=compiled),
        m.optimiser(model, fused=True),
    )
    if not boundaries:
        fast_attention.use_own(model)
    return lambda: m.our_step(model, objective, adam, batch).item()


def main() -> None:
    figures = {}
    for length, dtype, compiled in WAYS:
        torch._dynamo.reset()
        some = windows(length)
        batch = collate(some, 0)
        ways = {"mask": False, "boundaries": True}
        steps = {name: make(length, dtype, compiled, batch, boundaries=b) for name, b in ways.items()}
        seconds = m.interleaved(steps)
        name = f"{length}_{'fp32' if dtype == torch.float32 else 'bf16'}{'_compiled' if compiled else ''}"
        shown = {k: f"{1000 * v:.0f} ms" for k, v in seconds.items()}
        print(name, f"{sum(map(len, some))} documents", shown, file=sys.stderr, flush=True)
        figures[f"boundaries_vs_mask_{name}"] = seconds["mask"] / seconds["boundaries"]
    m.report("documents", figures)


if __name__ == "__main__":
    main()
