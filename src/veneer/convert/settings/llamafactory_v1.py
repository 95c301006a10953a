"""LLaMA-Factory's files of its version 1: https://github.com/hiyouga/LLaMA-Factory/tree/main/examples/v1"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer import settings
from veneer.convert.settings import execution, trainer
from veneer.convert.settings.given import NOTHING, UNSUPPORTED, Given, Translation, Uncarried, without_nothing
from veneer.errors import ConfigError

SIGNS = (
    "model_class",
    "peft_config.name",
    "train_dataset",
    "dist_config.name",
    "global_batch_size",
    "init_config",
)
DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "cutoff_len": 2048,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "peft_config.r": 8,
    "peft_config.lora_alpha": 16,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
    "seed": 42,
}
HARMLESS: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "model_class": ("llm",),
    "kernel_config.name": ("auto",),
    "kernel_config.include_kernels": ("auto",),
}
ELSEWHERE = {
    "template": "the tokenizer's own chat template is used",
    "dist_config.name": "Veneer trains on one device",
    "dist_config.dcp_path": "Veneer trains on one device",
    "init_config.name": "the model is loaded whole",
    "logging_steps": "Veneer logs every step",
    "batching_strategy": "Veneer packs texts into windows; set packing",
}


def translate(values: Mapping[str, Any], folder: Path = Path()) -> Translation:
    """Returns Veneer's settings for a file of version 1. Raises ConfigError for an unsupported adapter.

    folder: holds the list of data sets that train_dataset names.
    """
    given, out = Given(values, DEFAULTS), Translation("llamafactory-v1")
    out.settings |= without_nothing({"model": given.take("model"), "out": given.take("output_dir")})
    for theirs, ours in (("train_dataset", "data"), ("eval_dataset", "valid")):
        _data(given, out, folder, theirs, ours)
    _method(given, out)
    batch, whole = int(given.take("micro_batch_size")), given.take("global_batch_size")
    out.settings |= {
        "lr": float(given.take("learning_rate")),
        "batch": batch,
        "accumulate": max(1, int(whole or batch) // batch),
        "length": given.take("cutoff_len"),
        "seed": given.take("seed"),
    }
    trainer.optimiser(given, out, "optim")
    trainer.schedule(given, out, "lr_scheduler_type")
    trainer.rhythm(given, out)
    trainer.precision(given, out)
    execution.recomputed(given, out, "enable_activation_checkpointing")
    for key, why in {**dict.fromkeys(HARMLESS, UNSUPPORTED), **ELSEWHERE}.items():
        given.leave(key, why, HARMLESS.get(key, ()))
    out.uncarried += given.uncarried()
    return out


def _data(given: Given, out: Translation, folder: Path, theirs: str, ours: str) -> None:
    """Translates a list of data sets: a YAML file of {path, source, converter, ..} by name."""
    name = given.take(theirs)
    if name in NOTHING:
        return
    path = folder / str(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        out.settings[ours] = (str(name),)
        return
    for own, entry in settings.read_yaml(path.read_text(encoding="utf-8"), str(path)).items():
        out.settings[ours] = (*out.settings.get(ours, ()), str(entry.get("path", own)))
        for key, value in entry.items():
            if key not in ("path", "source") and value not in NOTHING:
                why = "Veneer infers the format of rows from columns" if key == "converter" else UNSUPPORTED
                out.uncarried.append(Uncarried(f"{theirs}.{own}.{key}", value, why))


def _method(given: Given, out: Translation) -> None:
    kind = given.take("peft_config.name")
    if kind is None:
        out.settings["method"] = "full"
        return
    if kind != "lora":
        raise ConfigError(f"LLaMA-Factory: peft_config.name must be lora or empty, got {kind!r}")
    names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    out.settings["method"] = "dora" if given.take("peft_config.use_dora") else "lora"
    found = {ours: given.take(f"peft_config.{theirs}") for ours, theirs in names.items()}
    found["stabilised"] = given.take("peft_config.use_rslora") or None
    out.settings["options"] = without_nothing(found)
    target = given.take("peft_config.target_modules") or "all"
    listed = tuple(t.strip() for t in target.split(",")) if isinstance(target, str) else tuple(target)
    out.settings["to"] = "all-linear" if listed in (("all",), ("all-linear",)) else listed
    if given.take("quant_config.name") not in NOTHING:
        bits = given.take("quant_config.quantization_bit")
        out.settings["quantise"] = "int8" if bits == 8 else "nf4"
