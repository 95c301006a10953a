"""Unsloth's arguments: https://github.com/unslothai/unsloth/blob/main/unsloth-cli.py"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.convert.settings import trl
from veneer.convert.settings.given import NOTHING, UNSUPPORTED, Given, Translation, without_nothing

SIGNS = (
    "random_state",
    "use_gradient_checkpointing",
    "save_method",
    "save_gguf",
    "quantization",
    "loftq_config",
)
DEFAULTS: dict[str, Any] = {
    "model_name": "unsloth/llama-3-8b",
    "max_seq_length": 2048,
    "dataset": "yahma/alpaca-cleaned",
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "warmup_steps": 5,
    "max_steps": 400,
    "learning_rate": 2e-4,
    "optim": "adamw_8bit",
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "seed": 3407,
    "output_dir": "outputs",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gradient_checkpointing": True,
}
HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "dtype": (None,),
    "random_state": (3407,),
    "full_finetuning": (False,),
    "trust_remote_code": (False,),
    "save_model": (False,),
    "save_gguf": (False,),
    "push_model": (False,),
    "push_gguf": (False,),
}
EXPORT = "export the trained adapter by `veneer export`"
ELSEWHERE = {
    "bias": "Veneer's LoRA leaves biases unchanged",
    "loftq_config": "Veneer's LoftQ is options={'init': 'loftq'} on a quantised base",
    "logging_steps": "Veneer logs every step",
    "random_state": "Veneer has one seed",
    "per_device_eval_batch_size": "evaluations use the size of training batches",
    "dtype": "set precision",
    **dict.fromkeys(("save_model", "save_method", "save_path", "save_gguf", "quantization"), EXPORT),
    **dict.fromkeys(("push_model", "push_gguf", "hub_path", "hub_token"), "Veneer uploads nothing"),
}


def translate(values: Mapping[str, Any]) -> Translation:
    """Returns Veneer's settings for Unsloth's arguments."""
    flat = dict(values)
    recomputed = flat.pop("use_gradient_checkpointing", None)  # "unsloth", or True
    given, out = Given({**flat, "gradient_checkpointing": recomputed}, DEFAULTS), Translation("unsloth")
    data = given.take("dataset")
    out.settings |= without_nothing(
        {
            "model": given.take("model_name"),
            "out": given.take("output_dir"),
            "data": (str(data),) if isinstance(data, str) else tuple(data),
            "length": given.take("max_seq_length"),
        }
    )
    out.settings["packing"] = bool(given.take("packing"))
    if given.take("full_finetuning") is True:
        out.settings["method"] = "full"
        for key in ("r", "lora_alpha", "target_modules", "load_in_4bit"):
            if given.values.get(key) not in NOTHING:
                given.leave(key, "full fine-tuning trains the unquantised base")
    else:
        trl.adapters(given, out, "r", "target_modules")
    trl.training(given, out)
    for key, why in {**dict.fromkeys(HARMLESS, UNSUPPORTED), **ELSEWHERE}.items():
        given.leave(key, why, HARMLESS.get(key, ()))
    out.uncarried += given.uncarried()
    return out
