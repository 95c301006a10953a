"""Lists PEFT 0.21's types of adapters beside Veneer's own methods: how each opens, or why it cannot."""

from __future__ import annotations

from typing import Literal, NamedTuple

from veneer.adapt.peft.settings import method_of
from veneer.adapt.peft.targets import Config
from veneer.adapt.tokens.alone import is_alone


class Form(NamedTuple):
    """The change of weights that an adapter of a type is, once PEFT has merged it.

    form: the smallest layout that holds it without loss. of_base: the change is computed from the base's
    weights.
    """

    form: str
    of_base: bool = False


# Methods of Veneer's read these, and rows of tokens.
NATIVE = {
    *(
        "ADALORA",
        "BOFT",
        "CARTRIDGE",
        "FOURIERFT",
        "HIRA",
        "HRA",
        "IA3",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "OFT",
    ),
    *("PREFIX_TUNING", "RANDLORA", "SHIRA", "TRAINABLE_TOKENS", "VERA"),
}
# `veneer convert` opens these: PEFT merges layer by layer in float64, and the change is kept in float32.
CONVERTED = {
    "ADAMSS": Form("factors"),
    "BEFT": Form("biases"),
    "C3A": Form("dense"),
    "DEFT": Form("dense", of_base=True),
    "DELORA": Form("factors"),
    "FROD": Form("dense", of_base=True),
    "GLORA": Form("dense, with biases", of_base=True),
    "GRALORA": Form("factors"),
    "LN_TUNING": Form("weights and biases of norms"),
    "OSF": Form("dense", of_base=True),
    "PEANUT": Form("factors", of_base=True),
    "POLY": Form("factors, for one task"),
    "PSOFT": Form("factors", of_base=True),
    "PVERA": Form("factors, of the mean"),
    "ROAD": Form("dense", of_base=True),
    "SUPERTUNING": Form("sparse"),
    "TINYLORA": Form("factors", of_base=True),
    "UNILORA": Form("factors"),
    "VBLORA": Form("factors"),
    "WAVEFT": Form("sparse or dense"),
}

PROMPTS = "it puts trained vectors in front of the text, which changes no weights; serve it with PEFT"
REFUSED = {
    "ADAPTION_PROMPT": (
        "its prompts enter the attention through a gate of their own, which changes no weights; serve it with"
        " PEFT"
    ),
    "CPT": PROMPTS,
    "LILY": (
        "its router averages over all tokens of a batch, padding and later tokens included, so the change"
        " depends on the batch; train a LoRA instead"
    ),
    "MULTITASK_PROMPT_TUNING": PROMPTS,
    "P_TUNING": PROMPTS,
    "PROMPT_TUNING": PROMPTS,
    "SHADOW": "it runs a second small model beside the base, which changes no weights; serve it with PEFT",
    "XLORA": "it mixes several adapters anew for every token; open each of its LoRA adapters by itself",
}


class Opened(NamedTuple):
    """The way in which one type opens, and how in words.

    by: "load" directly, "convert" first, "no" for a refused one.
    """

    by: Literal["load", "convert", "no"]
    how: str


def every() -> dict[str, Opened]:
    """Returns how each type of PEFT 0.21 opens, by name."""
    ways = {t: opened(t) for t in sorted({*NATIVE, *CONVERTED, *REFUSED})}
    return {t: way for t, way in ways.items() if way is not None}


def opened(peft_type: str) -> Opened | None:
    """Returns how adapters of a type open, or None for an unknown type."""
    config: Config = {"peft_type": peft_type}
    if method_of(config) is not None or is_alone(config):
        return Opened("load", "the file's own numbers")
    if peft_type in CONVERTED:
        form, of_base = CONVERTED[peft_type]
        return Opened("convert", form + (", for its own base" if of_base else ""))
    return Opened("no", REFUSED[peft_type]) if peft_type in REFUSED else None
