"""Learning rates where none is given: measured for the built-in model, the field's habits for others."""

from __future__ import annotations

# Rates by (method or "adapter", optimiser). The built-in model's come from a validation sweep, bench/demo_rates.py.
BUILTIN = {("full", "adamw"): 6e-4, ("adapter", "adamw"): 5e-3, ("adapter", "loraplus"): 1e-3}
# A low-rank change wants about ten times the rate of full fine-tuning; under LoRA+ the rate is A's, and B's is 16 times it.
OTHERS = {("full", "adamw"): 2e-5, ("adapter", "adamw"): 2e-4, ("adapter", "loraplus"): 5e-5}


def default(method: str, optimiser: str, builtin: bool) -> float:
    """The peak rate for a method and optimiser."""
    known = BUILTIN if builtin else OTHERS
    return known["full" if method == "full" else "adapter", optimiser]
