"""LLaMA-Factory's YAML or JSON: https://github.com/hiyouga/LLaMA-Factory/tree/main/examples"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.convert.settings import execution, preferences, trainer
from veneer.convert.settings.given import UNSUPPORTED, Given, Translation, Uncarried, without_nothing
from veneer.errors import ConfigError
from veneer.files import read_json

SIGNS = ("stage", "finetuning_type", "cutoff_len", "lora_target", "template", "dataset_dir")
DEFAULTS: dict[str, Any] = {
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset_dir": "data",
    "cutoff_len": 2048,
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "seed": 42,
    "loraplus_lr_embedding": 1e-6,
    "pissa_iter": 16,
}
HARMLESS: dict[str, tuple[Any, ...]] = {
    "do_train": (True,),
    "do_eval": (True, False),
    "trust_remote_code": (False,),
    "overwrite_cache": (True, False),
    "overwrite_output_dir": (False,),
    "plot_loss": (True, False),
    "logging_steps": (),
    "pissa_convert": (True, False),
    "galore_layerwise": (False,),
    "val_size": (0, 0.0),
    "packing": (True, False),
}
ELSEWHERE = {
    "template": "the tokenizer's own chat template is used",
    "additional_target": "Veneer does not fully train modules beside adapters",
    "val_size": "Veneer holds out a tenth of the data unless valid= is given",
    "mask_history": "Veneer trains on every assistant turn",
    "max_samples": "all rows are read; a source takes a share of its rows by its weight, as NAME@0.5",
    "galore_target": "Veneer's GaLore projects every matrix of the blocks",
    "galore_layerwise": "Veneer keeps one gradient for each weight",
    "freeze_trainable_layers": "method 'full' trains all layers",
    "adapter_name_or_path": "Veneer starts every training with a new adapter",
    "deepspeed": "Veneer trains on one device",
    "logging_steps": "Veneer logs every step",
    "buffer_size": "Veneer's stream holds windows, not rows; set buffer",
}
INFO = "dataset_info.json"
PREFERENCES = ("dpo", "kto")  # stages
JUDGED = ("ranking", "chosen", "rejected", "kto_tag")
MEDIA = ("images", "videos", "audios")
GALORE = {"rank": "galore_rank", "period": "galore_update_interval", "scale": "galore_scale"}


def translate(values: Mapping[str, Any], folder: Path = Path()) -> Translation:
    """Returns Veneer's settings for a LLaMA-Factory file.

    folder: holds dataset_info.json, which resolves names of data. Raises ConfigError for a stage or method
    that has no counterpart.
    """
    given, out = Given(values, DEFAULTS), Translation("llamafactory")
    stage, kind = given.take("stage"), given.take("finetuning_type")
    if stage not in ("sft", "pt", *PREFERENCES):
        raise ConfigError(f"LLaMA-Factory: stage must be sft, pt, dpo or kto, got {stage!r}")
    if kind not in ("lora", "full"):
        raise ConfigError(f"LLaMA-Factory: finetuning_type must be lora or full, got {kind!r}")
    out.settings |= without_nothing(
        {"model": given.take("model_name_or_path"), "out": given.take("output_dir")}
    )
    _data(given, out, folder, stage)
    if kind == "full":
        out.settings["method"] = "full"
        given.leave("quantization_bit", "full fine-tuning needs an unquantised base")
        if given.take("use_galore"):
            trainer.galore(given, out, GALORE)
    else:
        _method(given, out)
        _quantised(given, out)
    _training(given, out, stage)
    if stage in PREFERENCES:
        preferences.llamafactory(given, out, stage)
        out.settings = preferences.without_text(out.settings)
    for key, why in {**dict.fromkeys(HARMLESS, UNSUPPORTED), **ELSEWHERE}.items():
        given.leave(key, why, HARMLESS.get(key, ()))
    out.uncarried += given.uncarried()
    return out


def _training(given: Given, out: Translation, stage: str) -> None:
    out.settings |= {
        "lr": float(given.take("learning_rate")),
        "batch": given.take("per_device_train_batch_size"),
        "accumulate": given.take("gradient_accumulation_steps"),
        "length": given.take("cutoff_len"),
        "packing": _packing(given, out, stage),
        "train_on": "all" if stage == "pt" or given.take("train_on_prompt") else "completion",
        "seed": given.take("seed"),
    }
    trainer.arguments(given, out)
    execution.recomputed(given, out, "gradient_checkpointing")
    given.leave(
        "disable_gradient_checkpointing",
        "Veneer recomputes activations only if gradient_checkpointing is set",
        (True, False),
    )
    execution.compiled(given, out, "torch_compile")
    execution.streamed(given, out, given.take("streaming") is True)
    execution.tracked(given, out, "report_to")


def _packing(given: Given, out: Translation, stage: str) -> bool:
    neat, packing = given.take("neat_packing"), given.take("packing")
    if packing and not neat:
        out.notes.append(
            "packing: texts in one window never attend to each other, as with LLaMA-Factory's neat_packing"
        )
    return bool(neat or (stage == "pt" if packing is None else packing))


def _method(given: Given, out: Translation) -> None:
    out.settings["method"] = "dora" if given.take("use_dora") else "lora"
    rank, alpha = given.take("lora_rank"), given.take("lora_alpha")
    options = {
        "rank": rank,
        "alpha": 2 * rank if alpha is None else alpha,
        "dropout": given.take("lora_dropout"),
    }
    out.settings["options"] = without_nothing({**options, "stabilised": given.take("use_rslora") or None})
    if given.take("pissa_init"):
        out.settings["options"]["init"] = "pissa"
        given.leave("pissa_iter", "the iterations of PiSSA's randomised SVD are fixed", harmless=(-1,))
    else:
        given.take("pissa_iter")
    target = given.take("lora_target")
    names = tuple(t.strip() for t in target.split(",")) if isinstance(target, str) else tuple(target)
    out.settings["to"] = "all-linear" if names == ("all",) else names


def _quantised(given: Given, out: Translation) -> None:
    bits = {4: "nf4", 8: "int8"}
    if given.values.get("quantization_bit") in bits:
        out.settings["quantise"] = bits[given.take("quantization_bit")]
    else:
        given.leave("quantization_bit", "Veneer quantises to 4 or 8 bits")


def _data(given: Given, out: Translation, folder: Path, stage: str) -> None:
    """Translates names of data into files by dataset_info.json; lists unknown names as not carried."""
    where = folder / str(given.take("dataset_dir"))
    known = read_json(where / INFO) if (where / INFO).is_file() else {}
    for theirs, ours in (("dataset", "data"), ("eval_dataset", "valid")):
        names = given.take(theirs) or ()
        for name in [n.strip() for n in names.split(",")] if isinstance(names, str) else names:
            entry = known.get(name, {})
            if {"file_name", "hf_hub_url"} & {*entry}:
                out.settings[ours] = (*out.settings.get(ours, ()), _listed(where, name, entry))
                others = MEDIA if stage in PREFERENCES else (*JUDGED, *MEDIA)
                for key in [k for k in others if entry.get(k) or entry.get("columns", {}).get(k)]:
                    why = "of another task; Veneer refuses this data set"
                    out.uncarried.append(Uncarried(f"{theirs}.{name}.{key}", True, why))
            else:
                out.uncarried.append(Uncarried(theirs, name, f"{where / INFO} does not list this name"))
    if "valid" not in out.settings and given.values.get("val_size") in (0, 0.0):
        out.settings["valid"] = ("none",)


def _listed(where: Path, name: str, entry: Mapping[str, Any]) -> str:
    """Returns the file of a plain entry; else the entry's name, which stands for its columns and parts."""
    if set(entry) == {"file_name"}:
        return str(where / entry["file_name"])
    return f"{where / INFO}:{name}" if set(entry) != {"hf_hub_url"} else str(entry["hf_hub_url"])
