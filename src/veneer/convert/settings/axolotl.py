"""axolotl's YAML: https://docs.axolotl.ai/docs/config-reference.html"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.convert.settings import execution, preferences, trainer
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
    "unfrozen_parameters": "method 'full' trains all parameters; choose layers of an adapter by to=",
    "val_set_size": "Veneer holds out a tenth of the data unless valid= is given",
    "wandb_project": "a run is named after its folder",
    "wandb_name": "a run is named after its folder",
    "special_tokens": "the tokenizer is used unchanged",
    "tokens": "axolotl trains the whole embedding, add_tokens the new rows alone; give it by --add-tokens",
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
ROWS = {
    "split": "a file has no parts",
    "name": "a file has no configurations",
    "shards": "all rows are read; name the source with a weight, as NAME@0.5",
    "data_files": "name the files one by one in data=",
    "field_messages": "name the column by columns=, as messages=COLUMN",
    "roles_to_train": "set train_roles",
    "train_on_eos": "the end of a learned turn is learned",
}


def translate(values: Mapping[str, Any]) -> Translation:
    """Returns Veneer's settings for an axolotl file.

    Raises ConfigError unless the training is supervised or one of preferences.
    """
    given, out = Given(values, DEFAULTS), Translation("axolotl")
    if given.has("reward_model"):
        raise ConfigError("axolotl: reward models are unsupported; train preferences by rl: dpo")
    prefers = preferences.axolotl(given, out)
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
    if prefers:
        out.settings = preferences.without_text(out.settings)
    trainer.optimiser(given, out, "optimizer")
    _galore(given, out)
    trainer.schedule(given, out, "lr_scheduler")
    trainer.rhythm(given, out)
    trainer.precision(given, out)
    trainer.noise_and_patience(given, out)
    _carried_out(given, out)
    if given.take("auto_resume_from_checkpoints"):
        out.settings["resume"] = True
    out.settings |= without_nothing({"embedding_lr": given.take("embedding_lr")})
    for key, why in {**dict.fromkeys(HARMLESS, UNSUPPORTED), **ELSEWHERE}.items():
        given.leave(key, why, HARMLESS.get(key, ()))
    out.uncarried += given.uncarried()
    return out


def _galore(given: Given, out: Translation) -> None:
    """Translates GaLore, whose options axolotl holds in optim_args."""
    if not str(given.values.get("optimizer", "")).startswith("galore"):
        return
    given.left = [u for u in given.left if u.key != "optimizer"]
    own = {"rank": "optim_args.rank", "period": "optim_args.update_proj_gap", "scale": "optim_args.scale"}
    trainer.galore(given, out, own)
    given.leave("optim_target_modules", "Veneer's GaLore projects every matrix of the blocks")


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
            table = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
            if "path" in table:
                out.settings[ours] = (*out.settings.get(ours, ()), _source(table))
            for key, value in table.items():
                if value not in NOTHING:
                    why = ROWS.get(key, "Veneer infers the format of rows from columns")
                    out.uncarried.append(Uncarried(f"{theirs}[{i}].{key}", value, why))
    if "valid" not in out.settings and given.values.get("val_set_size") in (0, 0.0):
        out.settings["valid"] = ("none",)


def _source(table: dict[str, Any]) -> str:
    """Takes path, name and split of a data set from its table; returns Veneer's name of the source."""
    files, path = table.pop("data_files", None), str(table.pop("path"))
    if isinstance(files, str):
        table.pop("ds_type", None)
        return files
    if files is not None:
        table["data_files"] = files
    if Path(path).suffix:  # a file, which has one part
        return path
    parts = [str(table.pop(key)) for key in ("name", "split") if table.get(key) not in NOTHING]
    return ":".join([path, *parts])


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
