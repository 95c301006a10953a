"""Names the settings of adapter_config.json that cannot be read here, with the reason and the way out."""

from __future__ import annotations

import re

from veneer.adapt.peft import starts, types
from veneer.adapt.peft.settings import method_of, table
from veneer.adapt.peft.targets import Config, expressions
from veneer.adapt.tokens import alone

# Settings that make the adapter more than a change of the targeted layers' weights.
BEYOND = {
    "layer_replication": "the model's layers were repeated",
    "alora_invocation_tokens": "the adapter acts only behind certain tokens (aLoRA)",
    "arrow_config": "adapters are routed (Arrow)",
    "kasa_config": "the base's smallest singular values were cut off (KaSA)",
    "monteclora_config": "the factors are sampled (MonteCLoRA)",
    "velora_config": "activations were compressed (VeLoRA)",
    "use_bdlora": "the factors are block-diagonal",
    "use_qalora": "the input is pooled in groups (QALoRA)",
    "megatron_config": "the layers are Megatron's",
    "ensure_weight_tying": "tied layers share one pair of factors",
}
# Settings that are read, and that pairs of factors alone do not express.
BESIDE = {
    "target_parameters": "fused experts were adapted",
    "bias": "the base's biases were trained too",
    "lora_bias": "the low-rank branch has a bias",
    "trainable_token_indices": "single rows of the embedding were trained",
}
# Settings that change nothing in what the tensors mean; a cartridge's first keys and values did not train.
IDLE = ("runtime_config", "num_frozen_tokens")
# Settings of other programs' file of the same name.
DIALECTS = {
    "fine_tune_type": "mlx-lm's",
    "lora_parameters": "mlx-lm's",
    "architecture": "the adapters library's",
    "config": "the adapters library's",
}


def settings_problems(config: Config, has_initial: bool, *, only_pairs: bool = False) -> list[str]:
    """Returns a line per setting that cannot be read, with the reason and the way out.

    only_pairs: what pairs of factors do not express cannot be read either.
    """
    if "peft_type" not in config:
        other = next((d for k, d in DIALECTS.items() if k in config), "not PEFT's")
        return [
            f"this adapter_config.json is {other}: it has no peft_type; only PEFT's is read here: `veneer "
            "convert` makes one of it"
        ]
    if wrong := _wrong_types(config):
        return wrong
    kind = method_of(config)
    if kind is None and not alone.is_alone(config):
        return [unread(config["peft_type"])]
    known = alone.every() if kind is None else table(kind).every
    refused = {**BEYOND, **(BESIDE if only_pairs else {})}
    beyond = {k: why for k, why in refused.items() if config.get(k) and config[k] != known.get(k)}
    found = [
        f"{k}={config[k]!r}: {why}; this cannot be read: merge it in PEFT and keep the merged model"
        for k, why in beyond.items()
    ]
    unknown = [k for k in config if k not in known and k not in IDLE and config[k]]
    found += [
        f"{k}={config[k]!r}: a setting of PEFT that is not known here, and may change what the tensors mean"
        for k in unknown
    ]
    plain = {
        v: f"{k}={v!r}" for k in ("target_modules", "exclude_modules") if isinstance(v := config.get(k), str)
    }
    malformed = [plain.get(p, repr(p)) for p in expressions(config) if not _compiles(p)]
    found += [f"{p} is not a regular expression" for p in malformed]
    start = starts.problem(config.get("init_lora_weights", True), has_initial)
    return found + ([start] if start else [])


def unread(peft_type: str) -> str:
    """Returns why an adapter of this type cannot be read by its tensors alone, and the way out."""
    how = types.opened(peft_type)
    if how is None:
        return (
            f"peft_type {peft_type!r} is not a type of PEFT 0.21; update Veneer, or merge the adapter in PEFT"
        )
    if how.by == "no":
        return f"peft_type {peft_type!r} cannot be read: {how.how}"
    return (
        f"peft_type {peft_type!r} opens through PEFT's own merge:"
        " veneer convert FOLDER --to veneer --model BASE --out OUT"
    )


NAMES = (str, list, type(None))
FORMS: dict[str, tuple[type, ...]] = {
    "peft_type": (str,),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "modules_to_save": (list, type(None)),
    "layers_pattern": NAMES,
    "layers_to_transform": (int, list, type(None)),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float, type(None)),
    "bias": (str, type(None)),
}


def _wrong_types(config: Config) -> list[str]:
    """Returns a line per setting of another type, or with a list of anything but names."""
    found = []
    for key, kinds in FORMS.items():
        value = config.get(key)
        fits = key not in config or (isinstance(value, kinds) and not isinstance(value, bool))
        if fits and isinstance(value, list) and key != "layers_to_transform":
            fits = all(isinstance(one, str) for one in value)
        if not fits:
            found.append(f"{key} must be {_words(kinds)}, got {value!r:.60}")
    return found


def _words(kinds: tuple[type, ...]) -> str:
    words = {str: "text", list: "a list of names", dict: "a table", int: "a whole number", float: "a number"}
    return " or ".join(words.get(kind, "null") for kind in kinds)


def _compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False
