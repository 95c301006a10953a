"""axolotl's YAML: https://docs.axolotl.ai/docs/config-reference.html"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.convert.settings import execution, trainer
from veneer.convert.settings.given import NOTHING, UNSUPPORTED, Given, Translation, Uncarried, without_nothing
from veneer.errors import ConfigError

SIGNS = ("base_model", "micro_batch_size", "sequence_len", "lora_target_linear", "sample_packing")
DEFAULTS: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "micro_batch_size": 1,
    "num_epochs": 1.0,
    "sequence_len": 512,
    "optimizer": "adamw_torch_fused",
    "lr_scheduler": "cosine",
    "weight_decay": 0.0,
    "seed": 42,
    "warmup_ratio": 0.03,
}
# Values that ask for what Veneer does anyway.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "strict": (False,),
    "group_by_length": (False,),
    "tf32": (False,),
    "lora_fan_in_fan_out": (False,),
    "eval_sample_packing": (False,),
    "flash_attention": (False,),
    "shuffle_merged_datasets": (True,),
    "val_set_size": (0,),
}
ELSEWHERE = {
    "lora_modules_to_save": "Veneer does not fully train modules beside adapters",
    "lora_model_dir": "Veneer starts every training with a new adapter",
    "peft_layers_to_transform": "choose layers by an expression in to=",
    "val_set_size": "Veneer holds out a tenth of the data unless valid= is given",
    "wandb_project": "a run is named after its folder",
    "wandb_name": "a run is named after its folder",
    "special_tokens": "the tokenizer is used unchanged",
    "tokens": "the tokenizer is used unchanged",
    "chat_template": "the tokenizer's own template is used",
    "model_type": "the base model's own class is used",
    "tokenizer_type": "the base model's own tokenizer is used",
    "flash_attention": "transformers chooses the kernel",
    "sdp_attention": "transformers chooses the kernel",
    "evals_per_epoch": "Veneer evaluates every eval_every steps; set eval_every",
    "saves_per_epoch": "Veneer saves every save_every steps; set save_every",
    "logging_steps": "Veneer logs every step",
    "pad_to_sequence_len": "Veneer pads windows to the longest of a batch",
}


def translate(values: Mapping[str, Any]) -> Translation:
    """Returns Veneer's settings for an axolotl file. Raises ConfigError unless the training is supervised."""
    given, out = Given(values, DEFAULTS), Translation("axolotl")
    if given.has("rl") or given.has("reward_model"):
        raise ConfigError(
            f"axolotl: training must be supervised, got rl: {given.take('rl') or 'reward_model'}"
        )
    out.settings |= without_nothing(
        {
            "model": given.take("base_model"),
            "lr": _number(given.take("learning_rate")),
            "out": given.take("output_dir"),
        }
    )
    _data(given, out)
    _method(given, out)
    out.settings |= {
        "batch": given.take("micro_batch_size"),
        "accumulate": given.take("gradient_accumulation_steps"),
        "length": given.take("sequence_len"),
        "packing": bool(given.take("sample_packing")),
        "train_on": "all" if given.take("train_on_inputs") else "completion",
        "seed": given.take("seed"),
    }
    trainer.optimiser(given, out, "optimizer")
    trainer.schedule(given, out, "lr_scheduler")
    trainer.rhythm(given, out)
    trainer.precision(given, out)
    _carried_out(given, out)
    if given.take("auto_resume_from_checkpoints"):
        out.settings["resume"] = True
    out.settings |= without_nothing({"embedding_lr": given.take("embedding_lr")})
    for key, why in {**dict.fromkeys(HARMLESS, UNSUPPORTED), **ELSEWHERE}.items():
        given.leave(key, why, HARMLESS.get(key, ()))
    out.uncarried += given.uncarried()
    return out


def _carried_out(given: Given, out: Translation) -> None:
    execution.recomputed(given, out, "gradient_checkpointing")
    execution.compiled(given, out, "torch_compile")
    execution.streamed(given, out, given.has("pretraining_dataset") or given.take("streaming") is True)
    switched_on = [
        n
        for n in execution.TRACKERS
        if given.take(f"use_{n}") is True or (n == "wandb" and given.has("wandb_project"))
    ]
    execution.track(out, switched_on)


def _number(value: Any) -> float | None:
    return None if value in NOTHING else float(value)


def _data(given: Given, out: Translation) -> None:
    for theirs, ours in (("datasets", "data"), ("pretraining_dataset", "data"), ("test_datasets", "valid")):
        for i, entry in enumerate(given.take(theirs) or []):
            table = entry if isinstance(entry, Mapping) else {"path": entry}
            if "path" in table:
                out.settings[ours] = (*out.settings.get(ours, ()), str(table["path"]))
            for key, value in table.items():
                if key != "path" and value not in NOTHING:
                    out.uncarried.append(
                        Uncarried(
                            f"{theirs}[{i}].{key}", value, "Veneer infers the format of rows from columns"
                        )
                    )


def _method(given: Given, out: Translation) -> None:
    adapter = given.take("adapter")
    if adapter is None:
        out.settings["method"] = "full"
        for key in ("load_in_8bit", "load_in_4bit"):
            given.leave(key, "full fine-tuning needs an unquantised base", (False,))
        return
    if adapter not in ("lora", "qlora"):
        raise ConfigError(f"axolotl: adapter must be lora, qlora or empty, got {adapter!r}")
    eight, four = given.take("load_in_8bit"), given.take("load_in_4bit")
    if eight or four or adapter == "qlora":
        out.settings["quantise"] = "nf4" if four or adapter == "qlora" else "int8"
    out.settings["method"] = "dora" if given.take("peft_use_dora") else "lora"
    options = {
        "rank": given.take("lora_r"),
        "alpha": given.take("lora_alpha"),
        "dropout": given.take("lora_dropout"),
    }
    out.settings["options"] = without_nothing(
        {**options, "stabilised": given.take("peft_use_rslora") or None}
    )
    trainer.start(given, out, "peft_init_lora_weights")
    targets = given.take("lora_target_modules")
    if given.take("lora_target_linear"):
        out.settings["to"] = "all-linear"
    elif targets not in NOTHING:
        out.settings["to"] = targets if isinstance(targets, str) else tuple(targets)
