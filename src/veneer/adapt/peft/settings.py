"""Lists the settings that adapter_config.json may hold, with the defaults of PEFT 0.21."""

from __future__ import annotations

from typing import NamedTuple

from veneer import methods
from veneer.adapt.peft.targets import Config
from veneer.methods import Delta, PeftKind

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


TOP = "base_model."  # of tensors that all layers share


PREFIX = f"{TOP}model."


# Settings that PEFT has always written; others are written only if set, so that older readers do not warn.
LONG_KNOWN: Config = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "task_type": None,
}


# The other settings of PEFT 0.21 with their defaults.
NEWER: Config = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_version": None,
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


KEYS: Config = {**LONG_KNOWN, **NEWER}


# Settings of every kind of adapter.
GENERAL = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
    ),
    *("modules_to_save", "peft_type", "peft_version", "revision", "target_modules", "task_type"),
}


# PEFT trains these layers whole with every adapter of such a task, and fails on a file that lacks them.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class Table(NamedTuple):
    """The settings of one kind of PEFT adapter, with defaults: always written, and written if set."""

    always: Config
    others: Config

    @property
    def every(self) -> Config:
        return {**self.always, **self.others}


def table(kind: type[Delta]) -> Table:
    """Returns the settings of the method's kind."""
    if not issubclass(kind, PeftKind) or not kind.peft_settings:
        return Table(LONG_KNOWN, NEWER)
    always, others = general()
    return Table({**always, **kind.peft_settings}, others)


def general() -> Table:
    """Returns the settings of every kind of adapter."""
    every = {k: v for k, v in KEYS.items() if k in GENERAL}
    always = {
        k: v for k, v in every.items() if k in LONG_KNOWN and not k.startswith("layers")
    }  # which not every kind has
    return Table(always, {k: v for k, v in every.items() if k not in always})


def method_of(config: Config) -> type[Delta] | None:
    """Returns the method that reads adapters of this adapter_config.json, or None."""
    known = map(methods.get, methods.available())
    return next((m for m in known if issubclass(m, PeftKind) and m.reads_peft(config)), None)
