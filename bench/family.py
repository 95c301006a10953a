"""Measures LoRA on a small mixture of fused experts beside PEFT's: a step, its memory, and layouts of files;
and counts the types of PEFT's adapters that open (see _peft_types.py).

python bench/family.py [variant]

The model is a Mixtral of two blocks with 16 experts of which each token takes two, in float32 on one thread.
Both libraries adapt both parameters of the experts at rank 8, PEFT through `target_parameters`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import _measure as m
import memory
import torch
from _peft_types import peft_types

import veneer
from veneer.adapt.peft.parameters import joined, parted
from veneer.convert.experts import apart, together
from veneer.convert.pairs import Pair

EXPERTS, VOCABULARY, ROWS, LENGTH, RANK = 16, 1024, 2, 128, 8
NAMES = ["experts.gate_up_proj", "experts.down_proj"]
VARIANTS = ("veneer", "peft")


def mixture() -> Any:
    """Returns the model with random weights, in training mode."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=384,
            intermediate_size=768,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            use_cache=False,
        )
    ).train()


def adapted(variant: str, model: Any) -> Any:
    """Returns the model with LoRA of one library on all experts."""
    if variant == "veneer":
        return veneer.attach(model, "lora", to="experts", rank=RANK, alpha=2 * RANK)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=NAMES)
    return get_peft_model(model, config)


def step_of(variant: str, model: Any) -> m.Step:
    """Returns a whole step: forward, backward, AdamW."""
    whole, batch = adapted(variant, model), m.random_batch(ROWS, LENGTH, VOCABULARY)
    adam = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        whole(**batch).loss.backward()
        adam.step()
        adam.zero_grad()

    return step


def measure(variant: str) -> float:
    """Returns bytes of steps 3 to 5 over the loaded model."""
    import peft  # noqa: F401  (all variants have the same imports)

    torch.set_num_threads(1)
    model = mixture()
    before = memory.resident()
    step = step_of(variant, model)
    step(), step()
    with memory.Peak() as peak:
        for _ in range(3):
            step()
    return peak.bytes - before


def peak_of(variant: str) -> float:
    command = [sys.executable, str(Path(__file__).resolve()), variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def dense(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([B.double() @ A.double() for A, B in pairs])


def roundtrip() -> float:
    """Returns the largest relative error of the change through every layout and back, in float32."""
    draw = torch.Generator().manual_seed(0)
    E, r, f, h = 5, 3, 7, 11

    def of(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    pairs = [(of(r, h), of(2 * f, r)) for _ in range(E)]
    whole, errors = dense(pairs), []
    for swap in (False, True):  # PEFT since 0.19.1, and before
        back = parted(*joined(pairs, swap=swap), E, swap=swap)
        errors.append(dense(back) - whole)
    for interleaved in (False, True):  # a pair for each projection, as vLLM reads
        for shared in (True, False):
            back = []
            for e, (A, B) in enumerate(pairs):
                name = f"mlp.experts.{e}."
                parts = apart({f"{name}gate_up_proj": Pair(A, B, 1.0)}, interleaved=interleaved)
                gate, up = parts[f"{name}gate_proj"], parts[f"{name}up_proj"]
                if not shared:  # as two adapters that were trained apart hold them
                    up = Pair(up.A * 2, up.B / 2, 1.0)
                one = together(gate, up, interleaved=interleaved)
                back.append((one.A, one.B))
            errors.append(dense(back) - whole)
    return max(float(e.abs().max() / whole.abs().max()) for e in errors)


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    torch.set_num_threads(1)
    seconds = m.interleaved({v: step_of(v, mixture()) for v in VARIANTS})
    bytes_ = {v: peak_of(v) for v in VARIANTS}
    print({v: f"{1000 * seconds[v]:.0f} ms, {bytes_[v] / 2**20:.0f} MB" for v in VARIANTS}, file=sys.stderr)
    figures = {
        "experts_step_vs_peft": seconds["peft"] / seconds["veneer"],
        "experts_memory_vs_peft": bytes_["veneer"] / bytes_["peft"],
        "experts_roundtrip_error": roundtrip(),
        **peft_types(),
    }
    m.report("family", figures)


if __name__ == "__main__":
    main()
