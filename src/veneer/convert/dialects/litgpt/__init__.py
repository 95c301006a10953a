"""LitGPT: lit_model.pth.lora, a torch file, with q, k and v as one layer; settings in hyperparameters.yaml.

https://github.com/Lightning-AI/litgpt. lora_A (r * n, in) stacks the A of the n adapted projections among q,
k, v; lora_B (out of these, r) stacks their B. Until 0.5.3 (`attn.attn`) the fused layer interleaved the heads
in groups, q.. k v q.. k v. With all three adapted, its rows still took q's A first, then k's, then v's. Each
projection then mixes all three, which pairs of rank up to 3r hold exactly.
"""

from veneer.convert.dialects.litgpt.reading import read
from veneer.convert.dialects.litgpt.writing import write

__all__ = ["read", "write"]
