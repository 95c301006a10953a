"""Times one LoRA step: Veneer, PEFT at default and best, and the unavoidable matrix products.

python bench/train_step.py [configuration ..]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import _measure as m
import torch

# name: size, vocabulary, dtype, rows, tokens a row, and the figures wanted
CONFIGURATIONS: dict[str, tuple[str, int, torch.dtype, int, int]] = {
    "h512_32k_bf16": ("h512", 32000, torch.bfloat16, 4, 256),
    "h512_8k_bf16": ("h512", 8192, torch.bfloat16, 8, 256),
    "h1024_32k_bf16": ("h1024", 32000, torch.bfloat16, 4, 256),
    "h512_32k_fp32": ("h512", 32000, torch.float32, 4, 256),
}
COMPILED_PEER = {"h512_32k_bf16", "h512_8k_bf16"}
BOUND = {"h512_32k_bf16", "h512_32k_fp32", "h1024_32k_bf16"}


def products(model: Any, rows: int) -> Callable[[], None]:
    """Computes the products with frozen weights of one step, forward and backward, into buffers."""
    from torch import nn

    jobs = []
    for layer in (layer for layer in model.modules() if isinstance(layer, nn.Linear)):
        W = layer.weight.detach()
        x, y = torch.randn(rows, W.shape[1]).to(W), torch.randn(rows, W.shape[0]).to(W)
        jobs.append((W, x, y, torch.empty_like(x), torch.empty_like(y)))

    def act() -> None:
        for W, x, y, dx, out in jobs:
            torch.mm(x, W.mT, out=out)
            torch.mm(y, W, out=dx)

    return act


def ours(model: Any, batch: dict[str, torch.Tensor], compiled: bool = True) -> m.Step:
    """Returns a step of Veneer as `veneer fit --compile on` takes it."""
    from veneer.train.speed.compiling import prepare, warm_up

    model, batch = m.veneer_model(model), m.shifted(batch)
    objective, adam = (
        prepare(model, m.language_task(), batch, compiled=compiled),
        m.optimiser(model, fused=True),
    )
    if compiled:
        warm_up(model, objective, batch)
    return lambda: m.our_step(model, objective, adam, batch)


def peer(model: Any, batch: dict[str, torch.Tensor], *, best: bool) -> m.Step:
    """Returns a step of PEFT."""
    model = m.peft_model(model, best=best)
    adam = m.optimiser(model, fused=best)
    return lambda: m.peer_step(model, adam, batch)


def measure(name: str) -> dict[str, float]:
    """Returns the figures of one configuration."""
    size, vocabulary, dtype, rows, length = CONFIGURATIONS[name]
    torch._dynamo.reset()
    batch = m.random_batch(rows, length, vocabulary)
    steps: dict[str, Callable[[], Any]] = {"veneer": ours(m.llama(size, vocabulary, dtype), batch)}
    steps["peft"] = peer(m.llama(size, vocabulary, dtype), batch, best=False)
    if name in COMPILED_PEER:
        steps["compiled"] = peer(m.llama(size, vocabulary, dtype), batch, best=True)
    if name in BOUND:
        steps["bound"] = products(m.llama(size, vocabulary, dtype), rows * length)
    seconds = m.interleaved(steps)
    print(
        name,
        {k: f"{1000 * v:.0f} ms, {rows * length / v:.0f} tokens/s" for k, v in seconds.items()},
        file=sys.stderr,
        flush=True,
    )
    figures = {f"{name}_vs_{k}": seconds[k] / seconds["veneer"] for k in ("peft", "compiled") if k in seconds}
    if "bound" in seconds:
        figures[f"{name}_over_bound"] = seconds["veneer"] / seconds["bound"]
        figures |= removed(name, seconds)
    return figures


def removed(name: str, seconds: dict[str, float]) -> dict[str, float]:
    """Returns the shares of PEFT's avoidable time, over the products with frozen weights, that are gone.

    Comparable between machines, where the ratios of whole steps are not.
    """
    avoidable = seconds["peft"] - seconds["bound"]
    gone = {k: (seconds["peft"] - seconds[k]) / avoidable for k in ("veneer", "compiled") if k in seconds}
    ends = {"veneer": "avoidable_removed", "compiled": "avoidable_removed_by_compiled_peft"}
    return {f"{name}_{ends[k]}": share for k, share in gone.items()}


def main() -> None:
    figures: dict[str, float] = {}
    for name in sys.argv[1:] or CONFIGURATIONS:
        figures |= measure(name)
    m.report("train_step", figures)


if __name__ == "__main__":
    main()
