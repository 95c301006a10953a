"""Random Llamas whose weights are the same on every device, and measures of how far outputs are apart."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 300
Loss = tuple[Tensor, Tensor]  # logits and the gradients of the adapter, one after the other, in float32


def llama(dtype: torch.dtype, device: str, *, hidden: int = 64, layers: int = 2, **config: Any) -> Any:
    """Returns a Llama whose weights bfloat16 holds exactly, so that every precision has the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=hidden, intermediate_size=3 * hidden // 2, num_hidden_layers=layers)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.1, "use_cache": False, **config}))
    return made.to(torch.bfloat16).to(dtype).to(device).eval()


def batch(device: str, rows: int = 2, length: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Returns token ids, and the token after each as its label."""
    ids = torch.randint(0, VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1].to(device), "labels": ids[:, 1:].to(device)}


def task() -> Any:
    """Returns the task of language models, without a tokenizer: token 0 pads."""
    from veneer.data.reading import Reading
    from veneer.tasks.causal_lm import CausalLM

    return CausalLM(SimpleNamespace(pad_token_id=0), Reading())


def randomise(model: nn.Module, size: float = 0.05) -> None:
    """Adds a random step, the same on every device, to the trained parameters."""
    from veneer.adapt.attached import changes

    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, delta in changes(model, "default"):
            for p in delta.parameters():
                p.add_((size * torch.randn(p.shape, generator=draw)).to(p))


def copy_adapter(source: nn.Module, target: nn.Module) -> None:
    """Gives the target's adapter the numbers of the source's, fixed ones included."""
    from veneer.adapt.attached import changes

    for (_, ours), (_, theirs) in zip(changes(target, "default"), changes(source, "default"), strict=True):
        ours.load_state_dict(theirs.state_dict())


def outputs(model: Any, given: dict[str, Tensor], objective: Callable[..., Any] | None = None) -> Loss:
    """Returns logits and gradients on the CPU in float32. objective: a loss of the task's kind."""
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        logits = model(input_ids=given["input_ids"]).logits
    total, n = (objective or task().loss)(model, given)
    (total / n).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    joined = torch.cat([g.detach().float().flatten().cpu() for g in grads])
    return logits.detach().float().cpu(), joined


def off(a: Tensor, b: Tensor) -> float:
    """Returns the norm of the difference, relative to that of b."""
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
