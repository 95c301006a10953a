"""TRL's YAML for `trl sft`, dpo, kto, orpo and cpo: https://huggingface.co/docs/trl/sft_trainer"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.convert.settings import execution, preferences, trainer
from veneer.convert.settings.given import NOTHING, UNSUPPORTED, Given, Translation, Uncarried, without_nothing

SIGNS = (
    "use_peft", "dataset_name", "dataset_train_split", "completion_only_loss", "assistant_only_loss",
    "dataset_text_field", "packing_strategy", "padding_free", "chat_template_path", "loss_type",
    "desirable_weight", "undesirable_weight",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {  # of trl 1.16
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "learning_rate": 2e-5,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "max_length": 1024,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
}
HARMLESS: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "truncation_mode": ("keep_start",),
    "dataset_text_field": ("text",),
    "model_revision": ("main",),
    "loss_type": ("nll",),
    "lora_task_type": ("CAUSAL_LM",),
    "bnb_4bit_quant_type": ("nf4",),
    "packing_strategy": ("bfd",),
    "padding_free": (True, False),
    "do_train": (True,),
    "do_eval": (True, False),
    "shuffle_dataset": (True, False),
    "dataset_test_split": ("test",),
    "push_to_hub": (False,),
    "dtype": ("auto",),
}
ELSEWHERE = {
    "lora_modules_to_save": "Veneer does not fully train modules beside adapters",
    "lora_target_parameters": "choose layers by an expression in to=",
    "logging_steps": "Veneer logs every step",
    "logging_strategy": "Veneer logs every step",
    "eos_token": "the tokenizer's own end token is used",
    "pad_token": "the tokenizer's own padding is used",
    "attn_implementation": "transformers chooses the kernel",
    "dataset_text_field": "name the column by columns=, as text=COLUMN",
    "dataset_num_proc": "rows are read by one process",
    "per_device_eval_batch_size": "evaluations use the size of training batches",
    "eval_packing": "evaluations pack texts as training does",
    "truncation_mode": "ends of rows are cut by overlong='cut'",
    "use_bnb_nested_quant": "Veneer's nf4 keeps its scales in 32 bits",
    "dtype": "set precision",
    "run_name": "a run is named after its folder",
    "push_to_hub": "Veneer uploads nothing",
    "hub_model_id": "Veneer uploads nothing",
}


def translate(values: Mapping[str, Any], tool: str = "trl") -> Translation:
    """Returns Veneer's settings for TRL's trainers. tool: trl, or trl-dpo, trl-kto, trl-orpo, trl-cpo."""
    stage = preferences.stage_of_trl(values, tool)
    defaults = {**DEFAULTS, **(preferences.TRL_DEFAULTS if stage else {})}
    given, out = Given(values, defaults), Translation("trl")
    out.settings |= without_nothing(
        {"model": given.take("model_name_or_path"), "out": given.take("output_dir")}
    )
    _data(given, out)
    adapters(given, out) if given.take("use_peft") else _whole(given, out)
    out.settings["length"] = given.take("max_length")
    if stage:
        preferences.trl(given, out, stage)
    else:
        _texts(given, out)
    template = given.take("chat_template_path")
    out.settings |= without_nothing({"chat_template": template})
    training(given, out)
    for key, why in {**dict.fromkeys(HARMLESS, UNSUPPORTED), **ELSEWHERE}.items():
        if not (stage and key == "loss_type"):
            given.leave(key, why, HARMLESS.get(key, ()))
    out.uncarried += given.uncarried()
    return out


def _texts(given: Given, out: Translation) -> None:
    out.settings |= {
        "packing": bool(given.take("packing")),
        "train_on": "all" if given.take("completion_only_loss") is False else "completion",
    }
    if not given.take("assistant_only_loss"):
        out.notes.append(
            "train_on: Veneer learns the assistant's turns of conversations; TRL all, by default"
        )


def _data(given: Given, out: Translation) -> None:
    """Translates the data set, its configuration and its splits; entries of a mixture one by one."""
    name, config = given.take("dataset_name"), given.take("dataset_config")
    split, held_out = given.take("dataset_train_split"), given.take("dataset_test_split")
    mixture = given.take("datasets") or (
        [] if name in NOTHING else [{"path": name, "name": config, "split": split}]
    )
    for i, entry in enumerate(mixture):
        table = dict(entry)
        parts = [table.pop(key, None) for key in ("path", "name", "split")]
        source = ":".join(str(p) for p in parts if p not in NOTHING)
        out.settings["data"] = (*out.settings.get("data", ()), source)
        for key, value in table.items():
            if value not in NOTHING:
                why = "name the columns by columns=" if key == "columns" else UNSUPPORTED
                out.uncarried.append(Uncarried(f"datasets[{i}].{key}", value, why))
    evaluates = given.values.get("eval_strategy") not in (*NOTHING, "no")
    if name not in NOTHING and held_out not in NOTHING and evaluates:
        parts = [name, config, held_out]
        out.settings["valid"] = (":".join(str(p) for p in parts if p not in NOTHING),)


def _whole(given: Given, out: Translation) -> None:
    out.settings["method"] = "full"
    for key in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora"):
        if given.has(key):
            given.leave(key, "use_peft is off, so TRL ignores it")
    for key in ("load_in_8bit", "load_in_4bit"):
        given.leave(key, "full fine-tuning needs an unquantised base", (False,))


def adapters(
    given: Given, out: Translation, rank: str = "lora_r", targets: str = "lora_target_modules"
) -> None:
    """Translates LoRA's settings and a quantised base. rank, targets: the program's keys."""
    if given.take("load_in_4bit") or given.take("load_in_8bit"):
        out.settings["quantise"] = "nf4" if given.take("load_in_4bit") else "int8"
    out.settings["method"] = "dora" if given.take("use_dora") else "lora"
    found = {
        "rank": given.take(rank),
        "alpha": given.take("lora_alpha"),
        "dropout": given.take("lora_dropout"),
    }
    out.settings["options"] = without_nothing({**found, "stabilised": given.take("use_rslora") or None})
    names = given.take(targets)
    if isinstance(names, str):
        names = names.replace(",", " ").split()
    if names not in NOTHING:
        out.settings["to"] = "all-linear" if list(names) == ["all-linear"] else tuple(names)


def training(given: Given, out: Translation) -> None:
    """Translates the arguments of transformers' Trainer."""
    out.settings |= {
        "lr": float(given.take("learning_rate")),
        "batch": given.take("per_device_train_batch_size"),
        "accumulate": given.take("gradient_accumulation_steps"),
        "seed": given.take("seed"),
    }
    trainer.arguments(given, out)
    execution.recomputed(given, out, "gradient_checkpointing")
    execution.compiled(given, out, "torch_compile")
    execution.streamed(given, out, given.take("dataset_streaming") is True)
    execution.tracked(given, out, "report_to")
