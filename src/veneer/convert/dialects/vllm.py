"""Plain LoRA that vLLM, LoRAX, llama.cpp and PEFT read: the scaling folded into B, one rank.

Rules of vLLM 0.33's loader: https://docs.vllm.ai/en/latest/features/lora/
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer import files
from veneer.adapt.peft.settings import CONFIG, LONG_KNOWN, PREFIX, TENSORS
from veneer.convert import experts
from veneer.convert.base import Base
from veneer.convert.dialects import peft
from veneer.convert.pairs import Pairs, bare, folded, only, padded
from veneer.errors import FormatError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # allowed values of --max-lora-rank


def write(pairs: Pairs, folder: Path, base: Base) -> list[str]:
    """Writes the folder, completely or not at all.

    Raises FormatError for magnitudes, convolutions and ranks over 512.
    """
    only(pairs, ("linear", "embedding"), "vLLM", magnitude=False)
    ready, notes = folded(bare(pairs))
    most = max(p.rank for p in ready.sites.values())
    rank = legal_rank(most)
    if any(p.rank != rank for p in ready.sites.values()):
        notes.append(f"ranks up to {most} were padded with zeros to {rank}")
    ready = replace(padded(ready, rank), dropout=0.0)
    content, tensors_of = _laid_out(ready, base)
    with files.replacing(folder / TENSORS, folder / CONFIG) as (tensors, config):
        files.write_tensors(tensors, tensors_of)
        files.write_json(config, content)
    return [*notes, f"serve it with --enable-lora --max-lora-rank {rank}"]


def _laid_out(pairs: Pairs, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns settings and tensors: fused experts stacked where vLLM reads stacks, else a pair for each."""
    if base.kind not in experts.STACKED:
        ready = replace(pairs, sites=experts.apart(pairs.sites))
        return peft.settings(ready, base), peft.named(ready)
    rest, stacked = experts.stacks(pairs.sites)
    if not stacked:
        return peft.settings(pairs, base), peft.named(pairs)
    first = next(iter(pairs.sites.values()))
    content = {
        **LONG_KNOWN,
        "base_model_name_or_path": pairs.origin,
        "r": first.rank,
        "lora_alpha": first.rank,
        "target_modules": sorted(rest),
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        "task_type": pairs.task,
    }
    names = peft.named(replace(pairs, sites=rest)) if rest else {}
    return content, {**names, **{f"{PREFIX}{n}": t.contiguous() for n, t in stacked.items()}}


def legal_rank(rank: int) -> int:
    """Returns the smallest rank >= `rank` that vLLM serves. Raises FormatError above the largest."""
    legal = next((r for r in RANKS if r >= rank), None)
    if legal is None:
        raise FormatError(
            f"rank {rank} > {RANKS[-1]}, the largest that vLLM serves; truncate it with rank={RANKS[-1]}"
        )
    return legal
