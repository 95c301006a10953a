"""Every type of adapter that PEFT saves: settings for the tiny Llama, and a saved one with PEFT's outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TO = ["q_proj", "k_proj", "down_proj"]  # widths 32 -> 32, 32 -> 16 and 48 -> 32
TASK = 1  # of POLY's two
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
# Types with nothing that PEFT could save for this model alone, or that act by prompts.
UNMADE = ("ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PROMPT_TUNING", "SHADOW", "XLORA")
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "BEFT": {},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 3, "num_frozen_tokens": 1},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {},
    "GLORA": {},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LILY": {"r": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {},
    "PEANUT": {"r": 4},
    "POLY": {"r": 4, "n_tasks": 2, "n_skills": 2, "n_splits": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 5, 7]},
    "UNILORA": {"r": 2},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 16, "topk": 2},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 60},
    **{name: {} for name in UNMADE},
}
IDS = torch.tensor([[1, 5, 7, 3, 90, 11, 2], [5, 5, 4, 8, 1, 60, 33]])


def outputs(model: nn.Module, **more: Any) -> Tensor:
    """The logits of the model for IDS."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, **more).logits
    return logits


def saved(peft_type: str, base: nn.Module, folder: Path, **more: Any) -> Tensor | None:
    """Saves an adapter of the type by PEFT, away from its start; returns PEFT's outputs with it.

    For types that are not made here it writes settings and one tensor, and returns None.
    """
    import peft

    settings = {**SETTINGS[peft_type], **more, "task_type": "CAUSAL_LM"}
    if peft_type in UNMADE:
        folder.mkdir()
        content = {"peft_type": peft_type, "task_type": "CAUSAL_LM", "target_modules": None}
        (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
        from safetensors.torch import save_file

        save_file({"prompt_embeddings": torch.ones(2, 32)}, folder / "adapter_model.safetensors")
        return None
    if peft_type not in PREFIXES:
        settings.setdefault("target_modules", TO)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**settings)).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=draw).to(p))
    given = {"task_ids": torch.full((len(IDS),), TASK)} if peft_type == "POLY" else {}
    made = outputs(model, **given)
    model.save_pretrained(folder)
    return made
