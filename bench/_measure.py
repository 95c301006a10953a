"""Shared by the benches: models, peers, and interleaved timing in process CPU time on one thread."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

RANK, ALPHA = 16, 32
SIZES = {"h512": dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8)}
SIZES |= {
    "h1024": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16)
}

Step = Callable[[], Any]


def llama(size: str, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> Any:
    """Returns a Llama with random weights, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = SIZES[size]
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"],
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def peft_model(model: Any, *, best: bool) -> Any:
    """PEFT's LoRA on all linear layers: at its default, or with adapters in the model's dtype, compiled."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=not best)
    return torch.compile(adapted) if best else adapted


def veneer_model(model: Any) -> Any:
    """Returns the same with Veneer."""
    import veneer

    return veneer.attach(model, "lora", rank=RANK, alpha=ALPHA)


def optimiser(model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW over what trains: PyTorch's default, or fused."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, **(dict(fused=True) if fused else {})
    )


def peer_step(model: Any, adam: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Any:
    """Returns one step as transformers' users write it: the model computes the loss from labels."""
    loss = model(**batch).loss
    loss.backward()
    adam.step()
    adam.zero_grad()
    return loss


def language_task() -> Any:
    """Returns the task of language models, without a tokenizer: token 0 pads."""
    from veneer.data.reading import Reading
    from veneer.tasks.causal_lm import CausalLM

    return CausalLM(SimpleNamespace(pad_token_id=0), Reading())


def our_step(model: Any, objective: Any, adam: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Any:
    """Returns one step of Veneer: labels are shifted, as its batches have them."""
    total, n = objective(model, batch)
    loss = total / n
    loss.backward()
    adam.step()
    adam.zero_grad()
    return loss


def shifted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turns a transformers batch into Veneer's form: labels[i] is the token after input_ids[i]."""
    last = torch.full_like(batch["labels"][:, :1], -100)
    return {**batch, "labels": torch.cat([batch["labels"][:, 1:], last], 1)}


def random_batch(rows: int, length: int, vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows without padding, every position a label."""
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def interleaved(steps: dict[str, Step], repeats: int = 5, warm: int = 2) -> dict[str, float]:
    """Returns median process CPU seconds of each step, taken in turns after `warm` unmeasured rounds."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm + repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn >= warm:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def versions() -> dict[str, str]:
    """Returns versions of what is compared."""
    import importlib.metadata as metadata

    return {
        "python": platform.python_version(),
        **{n: metadata.version(n) for n in ("torch", "transformers", "peft")},
    }


def device() -> str:
    """Returns the processor or GPU in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        flags = "amx_bf16" if "amx_bf16" in open("/proc/cpuinfo", encoding="utf-8").read() else ""
        return f"{names[0]} {flags}, 1 thread".replace(" ,", ",")
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()}, 1 thread"


def report(bench: str, figures: dict[str, float]) -> dict[str, Any]:
    """Returns the one JSON line that every bench ends with, printed and returned."""
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    line = {"bench": bench, "device": device(), "versions": versions(), "figures": rounded}
    print(json.dumps(line), flush=True)
    return line
