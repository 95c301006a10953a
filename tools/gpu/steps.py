"""LoRA steps at a GPU's sizes: Veneer, PEFT at its default and compiled, and the frozen products alone."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import veneer
from gpu import models
from veneer.train.speed import compiling

SIZES = {"h2048": dict(hidden=2048, layers=4), "h4096": dict(hidden=4096, layers=4)}
TINY = dict(hidden=32, layers=2)
RANK, ROWS, LENGTH = 16, 4, 2048
Step = Callable[[], Any]


def steps(device: str, *, size: str, tiny: bool = False) -> dict[str, Any]:
    """Tokens a second, and peak memory over the loaded model, of each way; in this order while time lasts."""
    rows, length = (2, 16) if tiny else (ROWS, LENGTH)
    ways = {"veneer": _veneer, "peft": _peft, "bound": _products, "compiled": _compiled_peft}
    figures: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name, make in ways.items():
        model = _model(size, device, tiny)
        with compiling.eagerly(tiny):
            seconds[name], memory = _timed(partial(make, model, device, rows, length), device)
        del model
        figures[f"{size}_{name}_tokens_per_second"] = rows * length / seconds[name]
        if memory:
            figures[f"{size}_{name}_peak_mib"] = memory / 2**20
    figures |= {f"{size}_vs_{k}": seconds[k] / seconds["veneer"] for k in ("peft", "compiled")}
    figures[f"{size}_over_bound"] = seconds["veneer"] / seconds["bound"]
    avoidable = seconds["peft"] - seconds["bound"]
    figures[f"{size}_avoidable_removed"] = (seconds["peft"] - seconds["veneer"]) / avoidable
    return figures


def _model(size: str, device: str, tiny: bool) -> Any:
    heads = {} if tiny else {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000}
    sizes = TINY if tiny else SIZES[size]
    config = {"intermediate_size": int(sizes["hidden"] * 2.75) // 32 * 32, "max_position_embeddings": 4096}
    return models.llama(torch.bfloat16, device, **sizes, **heads, **config).train()


def _timed(make: Callable[[], Step], device: str, repeats: int = 5) -> tuple[float, int]:
    """Returns the median seconds of a step after two unmeasured ones, and the most bytes over the model."""
    step = make()
    step()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() - loaded if device == "cuda" else 0
    del step
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return sorted(taken)[repeats // 2], peak


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def _veneer(model: Any, device: str, rows: int, length: int) -> Step:
    given = models.batch(device, rows, length)
    veneer.attach(model, "lora", rank=RANK, alpha=2 * RANK)
    objective, adam = compiling.prepare(model, models.task(), given, compiled=True), _adam(model)
    compiling.warm_up(model, objective, given)
    return lambda: _step(lambda: _mean(objective(model, given)), adam)


def _peft(model: Any, device: str, rows: int, length: int, *, best: bool = False) -> Step:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    made: Any = get_peft_model(model, config, autocast_adapter_dtype=not best)
    made, adam = torch.compile(made) if best else made, _adam(made)
    ids = models.batch(device, rows, length)["input_ids"]
    return lambda: _step(lambda: made(input_ids=ids, labels=ids).loss, adam)


def _compiled_peft(model: Any, device: str, rows: int, length: int) -> Step:
    return _peft(model, device, rows, length, best=True)


def _products(model: Any, device: str, rows: int, length: int) -> Step:
    """The products with frozen weights of one step, forward and backward."""
    jobs = []
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        W, n = layer.weight.detach(), rows * length
        jobs.append((W, W.new_empty(n, W.shape[1]).normal_(), W.new_empty(n, W.shape[0]).normal_()))

    def act() -> None:
        for W, x, y in jobs:
            torch.mm(x, W.mT)
            torch.mm(y, W)

    return act


def _mean(found: tuple[torch.Tensor, int]) -> torch.Tensor:
    return found[0] / found[1]


def _step(loss: Callable[[], torch.Tensor], adam: torch.optim.Optimizer) -> None:
    loss().backward()  # type: ignore[no-untyped-call, unused-ignore]
    adam.step()
    adam.zero_grad()
