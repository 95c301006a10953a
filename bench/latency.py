"""Seconds of one decoded token at batch 1: a merged and an unmerged LoRA over the base."""

from __future__ import annotations

import sys
from typing import Any

import _measure as m
import torch

import veneer


def step_of(model: Any) -> m.Step:
    """Returns one token after 32 others, which stay in the cache."""
    model.eval()
    ids = m.random_batch(1, 33, 8192)["input_ids"]
    with torch.no_grad():
        cache = model(ids[:, :32], use_cache=True).past_key_values

    @torch.no_grad()
    def act() -> None:
        for _ in range(10):
            model(ids[:, 32:], past_key_values=cache, use_cache=True)
            cache.crop(-1)

    return act


@torch.no_grad()
def learned(model: Any) -> None:
    """Numbers for what trains as if something had been learned: a change of zero is not merged."""
    for p in (p for p in model.parameters() if p.requires_grad):
        p.add_(0.02 * torch.randn_like(p))


def main() -> None:
    base, merged, unmerged = (m.llama("h512", 8192, torch.bfloat16) for _ in range(3))
    for model in (merged, unmerged):
        learned(m.veneer_model(model))
    veneer.merge(merged)
    seconds = m.interleaved(
        {"base": step_of(base), "merged": step_of(merged), "unmerged": step_of(unmerged)}, repeats=15
    )
    print({k: f"{100 * v:.2f} ms a token" for k, v in seconds.items()}, file=sys.stderr)
    m.report(
        "latency", {f"{name}_over_base": seconds[name] / seconds["base"] for name in ("merged", "unmerged")}
    )


if __name__ == "__main__":
    main()
