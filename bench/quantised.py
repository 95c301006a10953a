"""Measures time, error and bytes of a frozen matrix in 8 or 4 bits, against bfloat16.

python bench/quantised.py

Products of one layer, d x d, with 1, 256 and 1024 tokens, forward and forward with the gradient of x, as
multiples of the same product in bfloat16; a LoRA step of a Llama of 4 layers, d = 512, in the same way; the
error in W, in a product and in the model's logits, for normal weights; bits a number as stored.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import _measure as m
import torch
from torch import Tensor, nn

import veneer
from veneer.compress.quantise import quantise
from veneer.ops import quant
from veneer.ops.matrix.residual import split
from veneer.tasks.text import next_token

D, TOKENS, ROWS, LENGTH, VOCABULARY = 1024, (1, 256, 1024), 4, 128, 4096


def layers() -> dict[str, nn.Module]:
    """Returns the same frozen layer in bfloat16 and in every format."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(D, D, bias=False)).to(torch.bfloat16).requires_grad_(False)
    nn.init.normal_(plain[0].weight, std=0.02)
    return {"bf16": plain, **{name: quantise(copy.deepcopy(plain), name) for name in quant.FORMATS}}


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = layer(x)
    return y


def both(layer: nn.Module, x: Tensor) -> None:
    """Forward, and the gradient of x."""
    x.grad = None
    layer(x).backward(torch.ones_like(x))


def products(figures: dict[str, float]) -> None:
    every = layers()
    for n in TOKENS:
        x = torch.randn(n, D, dtype=torch.bfloat16)
        learnt = x.clone().requires_grad_(True)
        calls = {name: partial(forward, layer, x) for name, layer in every.items()}
        calls |= {f"{name} step": partial(both, layer, learnt) for name, layer in every.items()}
        seconds = m.interleaved({k: repeated(c, 1 + 256 // n) for k, c in calls.items()}, repeats=9)
        for name in quant.FORMATS:
            figures[f"{name}_forward_{n}_over_base"] = seconds[name] / seconds["bf16"]
            figures[f"{name}_step_{n}_over_base"] = seconds[f"{name} step"] / seconds["bf16 step"]


def repeated(call: m.Step, times: int) -> m.Step:
    """Small products are too short for the processor's clock."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def errors(figures: dict[str, float]) -> None:
    """Of W and of x W' for normal weights, and of W with the best rank-16 part beside it."""
    W = 0.02 * torch.randn(D, D, generator=torch.Generator().manual_seed(1))
    x = torch.randn(256, D, generator=torch.Generator().manual_seed(2))
    for name, format in quant.FORMATS.items():
        parts = format.pack(W)
        kept = format.unpack(parts, (D, D), torch.float32)
        figures[f"{name}_weight_error"] = float((kept - W).norm() / W.norm())
        figures[f"{name}_product_error"] = float((x @ (kept - W).mT).norm() / (x @ W.mT).norm())
        figures[f"{name}_bits"] = 8 * sum(t.nbytes for t in format.pack(W.bfloat16())) / W.numel()
    for start, whole_first in (("qpissa", True), ("loftq", False)):
        for rank in (16, 128):
            draw = torch.Generator().manual_seed(0)
            found = split(W, quant.get("nf4"), rank, iterations=5, draw=draw, whole_first=whole_first)
            figures[f"{start}_rank_{rank}_weight_error"] = found.error


def steps(figures: dict[str, float]) -> None:
    """A LoRA step on each base, eagerly, and what it does to the logits of the untrained model."""
    m.SIZES["h512x4"] = {**m.SIZES["h512"], "num_hidden_layers": 4}
    batch = m.random_batch(ROWS, LENGTH, VOCABULARY)
    shifted, calls, logits, sizes = m.shifted(batch), {}, {}, {}
    for name in ("bf16", *quant.FORMATS):
        model: Any = m.llama("h512x4", VOCABULARY, torch.bfloat16)
        if name != "bf16":
            quantise(model, name)
        sizes[name] = sum(p.nbytes for p in model.parameters())
        with torch.no_grad():
            logits[name] = model(input_ids=batch["input_ids"]).logits.float()
        veneer.attach(model, "lora", rank=m.RANK, alpha=m.ALPHA)
        adam = m.optimiser(model, fused=True)
        calls[name] = partial(m.our_step, model, next_token.loss, adam, shifted)
    seconds = m.interleaved(calls)
    for name in quant.FORMATS:
        figures[f"{name}_lora_step_over_base"] = seconds[name] / seconds["bf16"]
        figures[f"{name}_logits_error"] = float(
            (logits[name] - logits["bf16"]).norm() / logits["bf16"].norm()
        )
        figures[f"{name}_model_bytes_over_base"] = sizes[name] / sizes["bf16"]


def main() -> None:
    figures: dict[str, float] = {}
    torch.set_num_threads(1)
    errors(figures)
    products(figures)
    steps(figures)
    m.report("quantised", figures)


if __name__ == "__main__":
    main()
