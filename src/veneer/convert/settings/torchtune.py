"""torchtune's YAML: https://github.com/pytorch/torchtune/tree/main/recipes/configs"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from veneer.convert.dialects.torchtune import HEAD, MODULES
from veneer.convert.settings import execution
from veneer.convert.settings.given import Given, Translation, without_nothing
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
    "dataset._component_": "what a row means is told from its columns; name files in data=",
    "tokenizer._component_": "the base model's own tokenizer is used",
    "tokenizer.path": "the base model's own tokenizer is used",
    "tokenizer.merges_file": "the base model's own tokenizer is used",
    "tokenizer.prompt_template": "the tokenizer's own chat template is used",
}
# Settings about files, logs and profiles that change nothing in what is learned.
SILENT = re.compile(
    r"profiler\..*|metric_logger\..*|checkpointer\.(_component_|checkpoint_files|recipe_checkpoint|output_dir|model_type|adapter_checkpoint)"
)


def translate(values: Mapping[str, Any]) -> Translation:
    """Our settings for a torchtune file. Raises ConfigError for recipes that are not supervised fine-tuning with LoRA or in full."""
    given, out = Given(_resolved(values), DEFAULTS), Translation("torchtune")
    builder = str(given.take("model._component_") or "")
    if any(word in str(given.values) for word in ("DPOLoss", "ppo_", "PPOLoss")):
        raise ConfigError("torchtune's preference recipes are not translated; supervised fine-tuning is")
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
        given.leave("loss._component_", "cross entropy is the loss here")
    for key, why in {**dict.fromkeys(HARMLESS, "not done here"), **ELSEWHERE}.items():
        given.leave(key, why, HARMLESS.get(key, ()))
    out.uncarried += given.uncarried()
    return out


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """The file with ${key} replaced by the value of the key at the top."""

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
            f"model.lora_attn_modules: torchtune has no attention module {unknown[0]!r}{suggest(unknown[0], _attention())}"
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
    if "adamw" not in str(given.take("optimizer._component_") or "AdamW").lower():
        given.leave(
            "optimizer._component_", "AdamW is used in its place; `veneer methods` lists the others here"
        )
    elif "8bit" in str(given.take("optimizer._component_")):
        given.leave("optimizer._component_", "AdamW keeps its state in 32 bits here")
    if given.take("optimizer.weight_decay"):
        out.notes.append("weight_decay shrinks the product B A here, and A and B apart there")
    epochs, per_epoch = given.take("epochs"), given.take("max_steps_per_epoch")
    steps = int(epochs) * int(per_epoch) if per_epoch else None
    out.settings |= {"steps": steps} if steps else {"epochs": float(epochs)}
    clip, train_on_input = given.take("clip_grad_norm"), given.take("dataset.train_on_input")
    if train_on_input is None:
        train_on_input = "alpaca" in str(
            given.take("dataset._component_")
        )  # torchtune's alpaca datasets learn the prompt too
    lr = given.take("optimizer.lr")
    out.settings |= {
        "weight_decay": float(given.take("optimizer.weight_decay") or 0.0),
        "clip": 0.0 if clip is None else float(clip),
        "batch": given.take("batch_size"),
        "accumulate": given.take("gradient_accumulation_steps"),
        "packing": bool(given.take("dataset.packed")),
        "train_on": "all" if train_on_input else "completion",
    }
    out.settings |= without_nothing(
        {
            "length": given.take("tokenizer.max_seq_len"),
            "lr": None if lr is None else float(lr),
            "seed": given.take("seed"),
        }
    )
    if "length" not in out.settings:
        out.notes.append(
            "tokenizer.max_seq_len is not set, so that no text is cut there; set length to that of the longest"
        )
    _schedule(given, out, steps)
    dtype, device = given.take("dtype"), given.take("device")
    out.settings |= without_nothing(
        {"precision": {"bf16": "bf16", "fp32": "fp32"}.get(dtype), "device": device}
    )
    if dtype not in ("bf16", "fp32"):
        given.leave("dtype", "bf16 and fp32 are trained in here")
    if given.take("resume_from_checkpoint"):
        out.settings["resume"] = True
        out.notes.append("resume goes on in the folder out= from its newest checkpoint, not from torchtune's")


def _schedule(given: Given, out: Translation, steps: int | None) -> None:
    name, number = (
        str(given.take("lr_scheduler._component_") or ""),
        given.take("lr_scheduler.num_warmup_steps"),
    )
    out.settings["schedule"] = "cosine" if "cosine" in name else "constant"
    if name and "cosine" not in name:
        given.leave("lr_scheduler._component_", "not a schedule here; cosine, linear and constant are")
    out.settings["warmup"] = min(float(number) / steps, 0.99) if number and steps else 0.0
    if number and not steps:
        given.leave(
            "lr_scheduler.num_warmup_steps",
            "warm-up is a share of the steps here, and the number of steps is not in the file; set warmup",
        )
