"""torchtune's YAML: https://github.com/pytorch/torchtune/tree/main/recipes/configs"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from veneer.convert.dialects.torchtune import HEAD, MODULES
from veneer.convert.settings import execution
from veneer.convert.settings.given import UNSUPPORTED, Given, Translation, without_nothing
from veneer.convert.settings.trainer import DECAY, OTHER_OPTIMISER, STATE_BITS, warmup
from veneer.errors import ConfigError, suggest

SIGNS = ("model._component_", "tokenizer._component_", "checkpointer._component_", "optimizer._component_")
DEFAULTS: dict[str, Any] = {
    "batch_size": 2,
    "epochs": 1,
    "gradient_accumulation_steps": 1,
    "optimizer.weight_decay": 0.01,
    "model.lora_alpha": 16,
    "model.lora_rank": 8,
}
HARMLESS: dict[str, tuple[Any, ...]] = {
    "shuffle": (True,),
    "save_adapter_weights_only": (True, False),
    "enable_activation_offloading": (False,),
    "optimizer.fused": (True, False),
    "log_every_n_steps": (1,),
    "log_peak_memory_stats": (True, False),
    "profiler.enabled": (False,),
    "optimizer_in_bwd": (False,),
}
ELSEWHERE = {
    "dataset._component_": "Veneer infers the format of rows from columns; name files in data=",
    "tokenizer._component_": "the base model's own tokenizer is used",
    "tokenizer.path": "the base model's own tokenizer is used",
    "tokenizer.merges_file": "the base model's own tokenizer is used",
    "tokenizer.prompt_template": "the tokenizer's own chat template is used",
}
# Settings of files, logs and profiles that do not change the training.
SILENT = re.compile(
    r"profiler\..*|metric_logger\..*|checkpointer\."
    r"(_component_|checkpoint_files|recipe_checkpoint|output_dir|model_type|adapter_checkpoint)"
)


def translate(values: Mapping[str, Any]) -> Translation:
    """Returns Veneer's settings for a torchtune file.

    Raises ConfigError for recipes other than supervised fine-tuning, with LoRA or in full.
    """
    given, out = Given(_resolved(values), DEFAULTS), Translation("torchtune")
    builder = str(given.take("model._component_") or "")
    if any(word in str(given.values) for word in ("DPOLoss", "ppo_", "PPOLoss")):
        raise ConfigError("torchtune: training must be supervised, got a preference recipe")
    out.settings |= without_nothing(
        {"model": given.take("checkpointer.checkpoint_dir"), "out": given.take("output_dir")}
    )
    files = given.take("dataset.data_files")
    out.settings |= without_nothing({"data": (files,) if isinstance(files, str) else tuple(files or ())})
    given.leave("dataset.source", "name files in data=", harmless=("json", "text") if files else ())
    if ".lora_" in builder or ".qlora_" in builder:
        _method(given, out, builder)
    else:
        out.settings["method"] = "full"
    _training(given, out)
    execution.recomputed(given, out, "enable_activation_checkpointing")
    execution.compiled(given, out, "compile")
    for key in [k for k in given.values if SILENT.fullmatch(k)]:
        given.take(key)
    if re.search(r"CrossEntropy|CEWith", str(given.take("loss._component_") or "CrossEntropy")) is None:
        given.leave("loss._component_", "Veneer's loss is cross entropy")
    for key, why in {**dict.fromkeys(HARMLESS, UNSUPPORTED), **ELSEWHERE}.items():
        given.leave(key, why, HARMLESS.get(key, ()))
    out.uncarried += given.uncarried()
    return out


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with ${key} replaced by the value of the top-level key."""

    def put(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: put(v) for k, v in value.items()}
        if isinstance(value, str):
            return re.sub(r"\$\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), value)
        return value

    return {k: put(v) for k, v in values.items()}


def _method(given: Given, out: Translation, builder: str) -> None:
    if given.take("model.quantize_base") or ".qlora_" in builder:
        out.settings["quantise"] = "nf4"
    out.settings["method"] = "dora" if given.take("model.use_dora") else "lora"
    options = {
        "rank": given.take("model.lora_rank"),
        "alpha": given.take("model.lora_alpha"),
        "dropout": given.take("model.lora_dropout"),
    }
    out.settings["options"] = without_nothing(options)
    own = given.take("model.lora_attn_modules") or ()
    unknown = [m for m in own if f"attn.{m}" not in MODULES]
    if unknown:
        raise ConfigError(
            "model.lora_attn_modules: unknown attention module"
            f" {unknown[0]!r}{suggest(unknown[0], _attention())}"
        )
    names = [MODULES[f"attn.{m}"] for m in own]
    if given.take("model.apply_lora_to_mlp"):
        names += [n for n in MODULES.values() if n.startswith("mlp.")]
    if given.take("model.apply_lora_to_output"):
        names += HEAD.values()
    out.settings["to"] = tuple(n.rpartition(".")[2] for n in names)


def _attention() -> list[str]:
    return [m.removeprefix("attn.") for m in MODULES if m.startswith("attn.")]


def _training(given: Given, out: Translation) -> None:
    _optimiser(given, out)
    epochs, per_epoch = given.take("epochs"), given.take("max_steps_per_epoch")
    steps = int(epochs) * int(per_epoch) if per_epoch else None
    out.settings |= {"steps": steps} if steps else {"epochs": float(epochs)}
    train_on_input = given.take("dataset.train_on_input")
    if train_on_input is None:  # torchtune's alpaca data sets train on the prompt too
        train_on_input = "alpaca" in str(given.take("dataset._component_"))
    out.settings |= {
        "batch": given.take("batch_size"),
        "accumulate": given.take("gradient_accumulation_steps"),
        "packing": bool(given.take("dataset.packed")),
        "train_on": "all" if train_on_input else "completion",
    }
    length, seed = given.take("tokenizer.max_seq_len"), given.take("seed")
    out.settings |= without_nothing({"length": length, "seed": seed})
    if "length" not in out.settings:
        out.notes.append(
            "tokenizer.max_seq_len is not set, so torchtune truncates no text; set length to that of the"
            " longest"
        )
    _schedule(given, out, steps)
    dtype, device = given.take("dtype"), given.take("device")
    out.settings |= without_nothing(
        {"precision": {"bf16": "bf16", "fp32": "fp32"}.get(dtype), "device": device}
    )
    if dtype not in ("bf16", "fp32"):
        given.leave("dtype", "Veneer trains in bf16 or fp32")
    if given.take("resume_from_checkpoint"):
        out.settings["resume"] = True
        out.notes.append(
            "resume continues from the newest checkpoint in the folder out=, not from torchtune's"
        )


def _optimiser(given: Given, out: Translation) -> None:
    if "adamw" not in str(given.take("optimizer._component_") or "AdamW").lower():
        given.leave("optimizer._component_", OTHER_OPTIMISER)
    elif "8bit" in str(given.take("optimizer._component_")):
        given.leave("optimizer._component_", STATE_BITS)
    if given.take("optimizer.weight_decay"):
        out.notes.append(DECAY)
    lr, clip = given.take("optimizer.lr"), given.take("clip_grad_norm")
    out.settings["weight_decay"] = float(given.take("optimizer.weight_decay") or 0.0)
    out.settings["clip"] = 0.0 if clip is None else float(clip)
    out.settings |= without_nothing({"lr": None if lr is None else float(lr)})


def _schedule(given: Given, out: Translation, steps: int | None) -> None:
    name = str(given.take("lr_scheduler._component_") or "")
    number = given.take("lr_scheduler.num_warmup_steps")
    out.settings["schedule"] = "cosine" if "cosine" in name else "constant"
    if name and "cosine" not in name:
        given.leave("lr_scheduler._component_", "unsupported schedule; supported: constant, cosine, linear")
    out.settings["warmup"] = warmup(float(number), steps) if number else 0.0
