"""Takes factors of fused experts apart into a pair for each projection, and puts them together again.

vLLM reads pairs called `<module>.experts.<e>.gate_proj`, `up_proj` and `down_proj`, and for the models in
STACKED the stacks that PEFT writes since 0.19.1: https://docs.vllm.ai/en/latest/features/lora/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from veneer.adapt.peft.parameters import joined
from veneer.convert.pairs import Pair

STACKED = (
    "gpt_oss",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
    "qwen3_omni_moe",
)
ONE = re.compile(r"(?P<module>.*\bexperts)\.(?P<index>\d+)\.(?P<name>gate_up_proj|down_proj)")
ENDS = ("lora_A.weight", "lora_B.weight")


def apart(sites: Mapping[str, Pair], *, interleaved: bool = False) -> dict[str, Pair]:
    """Returns the sites with `gate_up_proj` of every expert as `gate_proj` and `up_proj`, which share A."""
    found: dict[str, Pair] = {}
    for name, pair in sites.items():
        one = ONE.fullmatch(name)
        if one is None or one["name"] != "gate_up_proj":
            found[name] = pair
            continue
        gate, up = (pair.B[::2], pair.B[1::2]) if interleaved else pair.B.chunk(2)
        for part, B in (("gate_proj", gate), ("up_proj", up)):
            found[f"{one['module']}.{one['index']}.{part}"] = replace(pair, B=B.contiguous())
    return found


def together(gate: Pair, up: Pair, *, interleaved: bool = False) -> Pair:
    """Returns one pair for both projections, of the same rank if they share A, else of the sum."""
    B, C = gate.scaling * gate.B, up.scaling * up.B
    if torch.equal(gate.A, up.A):
        rows = (B, C)
        A = gate.A
    else:
        A = torch.cat([gate.A, up.A])
        rows = (
            torch.cat([B, torch.zeros_like(B[:, :1]).expand(-1, C.shape[1])], 1),
            torch.cat([torch.zeros_like(C[:, :1]).expand(-1, B.shape[1]), C], 1),
        )
    whole = torch.stack(rows, 1).flatten(0, 1) if interleaved else torch.cat(rows)
    return Pair(A, whole, 1.0)


def stacks(sites: Mapping[str, Pair]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Returns the sites beside the experts, and the experts' stacks by their names in PEFT's layout.

    PEFT and vLLM both read A on the input's side, for models that keep (in, out) too.
    """
    found: dict[tuple[str, str], dict[int, Pair]] = {}
    rest = {n: p for n, p in sites.items() if ONE.fullmatch(n) is None}
    for name, pair in sites.items():
        one = ONE.fullmatch(name)
        if one is not None:
            found.setdefault((one["module"], one["name"]), {})[int(one["index"])] = pair
    tensors: dict[str, Tensor] = {}
    for (module, name), pairs in found.items():
        nested = "base_layer." if name == "gate_up_proj" and (module, "down_proj") in found else ""
        factors = [(pairs[i].A, pairs[i].B) for i in range(len(pairs))]
        for end, t in zip(ENDS, joined(factors, swap=False), strict=True):
            tensors[f"{module}.{nested}{end}"] = t
    return rest, tensors
