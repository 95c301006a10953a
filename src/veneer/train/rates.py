"""Default learning rates: measured for the built-in model, the field's habits for others."""

from __future__ import annotations

from veneer.errors import ConfigError, option

# Rates by (method or "adapter", optimiser). The built-in model's come from validation sweeps:
# bench/demo_rates.py for full fine-tuning, LoRA and LoRA+, bench/optimiser_rates.py for the other optimisers.
BUILTIN = {
    ("full", "adamw"): 6e-4,
    ("adapter", "adamw"): 5e-3,
    ("adapter", "loraplus"): 1e-3,
    ("adapter", "scaled"): 5e-3,
    ("adapter", "balanced"): 6e-4,
    ("adapter", "lora-muon"): 5e-3,
    ("adapter", "lorapro"): 2e-3,
    ("adapter", "lorapro-sgd"): 1.0,
}
# A low-rank change takes about ten times the rate of full fine-tuning. Under LoRA+ the rate is A's, and B's
# is 16 times it. LoRA-Pro's is that of its authors' scripts. Rates that nobody published are not guessed.
OTHERS = {
    ("full", "adamw"): 2e-5,
    ("adapter", "adamw"): 2e-4,
    ("adapter", "loraplus"): 5e-5,
    ("adapter", "lorapro"): 2e-5,
}
# Starts with large factors, which move the weights as far per step as full fine-tuning does: they take its
# rate.
AS_FULL = ("loraga", "qpissa")

# Methods with parameters of another size than LoRA's, under AdamW: on the built-in model by a coarse sweep,
# bench/method_rates.py; on others from their papers ((IA)3's from FLoRA's comparison), as far as published.
OWN_BUILTIN = {"miss": 2e-3, "bat": 2e-3, "fourierft": 0.8, "loldu": 2e-3, "loraxs": 4e-3, "vera": 8e-2}
OWN_BUILTIN |= {"ia3": 0.128, "flora": 3.2e-2, "bitfit": 6.4e-2, "bottleneck": 8e-3, "prefix": 0.32}
OWN_OTHERS = {"miss": 2e-5, "bat": 2e-5, "fourierft": 5e-2, "ia3": 5e-3, "flora": 8e-3}
OWN_OTHERS |= {"bitfit": 1.6e-3, "bottleneck": 1e-4, "prefix": 1e-4}
LIKE_LORA = ("lora", "dora")  # DoRA's paper uses LoRA's rates


def default(method: str, optimiser: str, builtin: bool, init: str = "") -> float:
    """Returns the default peak rate of a method, an optimiser and a start. Raises ConfigError if none is
    known."""
    known = BUILTIN if builtin else OTHERS
    if method in OWN_BUILTIN:
        return _own(method, optimiser, OWN_BUILTIN if builtin else OWN_OTHERS)
    kind = (
        "full"
        if method in ("full", "dense") or (init in AS_FULL and ("full", optimiser) in known)
        else "adapter"
    )
    if (kind, optimiser) in known:
        return known[kind, optimiser]
    measured = BUILTIN.get((kind, optimiser))
    hint = (
        f"; the built-in model's is {measured:g}, AdamW's there {BUILTIN[kind, 'adamw']:g}"
        if measured
        else ""
    )
    raise ConfigError(f"no rate is known for {optimiser!r} on this model; give {option('lr')}{hint}")


def _own(method: str, optimiser: str, known: dict[str, float]) -> float:
    if optimiser == "adamw" and method in known:
        return known[method]
    hint = f"; AdamW's on the built-in model is {OWN_BUILTIN[method]:g}"
    raise ConfigError(
        f"no rate is known for method {method!r} and optimiser {optimiser!r} on this model; give"
        f" {option('lr')}{hint}"
    )


def borrowed(method: str, rate: float) -> str:
    """Returns a note for a rate that is LoRA's because this method's own was never measured, else ""."""
    lora = {r for table in (BUILTIN, OTHERS) for (kind, _), r in table.items() if kind == "adapter"}
    if method in ("full", "dense") or method in LIKE_LORA or method in OWN_BUILTIN or rate not in lora:
        return ""
    return f" (LoRA's: none was measured for {method!r}; try others with --lr, by factors of 4)"
