"""Plain LoRA that vLLM, LoRAX, llama.cpp and PEFT read: the scaling folded into B, one rank.

Rules of vLLM 0.33's loader: https://docs.vllm.ai/en/latest/features/lora/
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from veneer import files
from veneer.adapt.peft.settings import CONFIG, TENSORS
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
    content = peft.settings(ready, base)
    with files.replacing(folder / TENSORS, folder / CONFIG) as (tensors, config):
        files.write_tensors(tensors, peft.named(ready))
        files.write_json(config, content)
    return [*notes, f"serve it with --enable-lora --max-lora-rank {rank}"]


def legal_rank(rank: int) -> int:
    """Returns the smallest rank >= `rank` that vLLM serves. Raises FormatError above the largest."""
    legal = next((r for r in RANKS if r >= rank), None)
    if legal is None:
        raise FormatError(
            f"rank {rank} > {RANKS[-1]}, the largest that vLLM serves; truncate it with rank={RANKS[-1]}"
        )
    return legal
