"""PEFT's rules of names and settings, one by one: targets, patterns, heads, types, names of state dicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import models
from torch import nn

from veneer.adapt.peft import adapter_names, origin, refusals, settings, targets, types
from veneer.errors import FormatError

Q0, Q1, TOP = "model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj", "lm_head"
NAMES = [TOP, Q0, "model.layers.0.mlp.up", Q1, "model.layers.1.mlp.up", "1.q_proj"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj"]}, [Q0, Q1, "1.q_proj"]),
        ({"target_modules": ["lm_head", "layers.0.attn.q_proj"]}, [TOP, Q0]),
        ({"target_modules": ["proj", "p"]}, []),  # no ends of words
        ({"target_modules": r"model\..*\.(up|q_proj)", "exclude_modules": ["up"]}, [Q0, Q1]),
        ({"target_modules": ["q_proj", "up"], "exclude_modules": r".*\.1\..*"}, [Q0, NAMES[2], "1.q_proj"]),
        ({"target_modules": ["q_proj", "up"], "exclude_modules": ["q_proj", "1.mlp.up"]}, [NAMES[2]]),
        ({"target_modules": ["q_proj", TOP], "exclude_modules": [TOP]}, [Q0, Q1, "1.q_proj"]),
        ({"target_modules": ["q_proj", "up"], "modules_to_save": ["lm_head", "0.mlp"]}, [Q0, Q1, *NAMES[4:]]),
        ({"target_modules": ["q_proj", TOP], "layers_to_transform": [1]}, [TOP, Q1]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, [Q0]),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, [Q0, Q1, "1.q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}, [Q0, Q1]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, [Q1]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]}, []),
    ],
)
def test_the_layers_that_settings_target(config: dict[str, Any], expected: list[str]) -> None:
    assert [n for n in NAMES if targets.targeted(config, n)] == sorted(expected, key=NAMES.index)


def test_a_pattern_of_layers_may_begin_a_name() -> None:
    """PEFT asks for a dot before a block's own name, but not before a given pattern."""
    own = {"target_modules": ["q"], "layers_to_transform": [2]}
    assert not targets.targeted(own, "h.2.q")
    assert targets.targeted({**own, "layers_pattern": "h"}, "h.2.q")


def test_ranks_and_alphas_of_one_layer() -> None:
    config = {
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"q_proj": 4, "layers.1.attn.q_proj": 2},
        "alpha_pattern": {r".*\.up": 3},
        "bias": "none",
    }
    rest = {"bias": "none"}
    assert targets.at(config, Q1) == {"r": 4, "lora_alpha": 16, **rest}  # the first that fits
    assert targets.at(config, NAMES[2]) == {"r": 8, "lora_alpha": 3, **rest}
    assert targets.at(config, "my_q_proj") == {"r": 8, "lora_alpha": 16, **rest}
    assert targets.at({"r": 8, "rank_pattern": None, "alpha_pattern": {"q_proj": 1}}, Q0) == {"r": 8}


def test_modules_kept_whole() -> None:
    assert targets.wrapped({"modules_to_save": ["up", "head"]}, NAMES) == {TOP, NAMES[2], NAMES[4]}
    for none in (None, []):
        assert targets.wrapped({"modules_to_save": none}, NAMES) == set()
    assert targets.wrapped({}, NAMES) == set()


def test_every_expression_of_the_settings_is_listed() -> None:
    found = targets.expressions(
        {
            "target_modules": "a",
            "exclude_modules": "b",
            "rank_pattern": {"c": 1},
            "n_frequency_pattern": {"d": 1},
            "alpha_pattern": None,
            "modules_to_save": ["e"],
            "layers_pattern": "ff",
        }
    )
    assert sorted(found) == sorted(
        ["a", "b", r"(.*\.)?(c)$", r"(.*\.)?(d)$", r"(^|.*\.)e($|\..*)", r".*?\.ff\.(\d+)\."]
    )
    assert targets.expressions({"target_modules": ["a"], "layers_pattern": ["g", "h"]}) == [
        r".*?\.g\.(\d+)\.",
        r".*?\.h\.(\d+)\.",
    ]
    assert targets.expressions({"target_modules": ["a"]}) == []


STATE = [
    "x.lora_A.{}.weight",
    "x.lora_B.{}.bias",
    "e.lora_embedding_A.{}",
    "x.lora_magnitude_vector.{}.weight",
]


def test_names_of_a_state_dict_lose_the_adapter_s() -> None:
    whole = ["c.modules_to_save.fr.weight", "c.original_module.weight", "x.base_layer.weight"]
    found = adapter_names.without({k.format("fr"): torch.zeros(1) for k in [*STATE, *whole]})
    plain = [k.replace(".{}", "") for k in STATE]
    assert list(found) == [*plain, "c.weight", "x.base_layer.weight"]


def test_names_of_saved_files_stay() -> None:
    names = [*(k.replace(".{}", "") for k in STATE), "c.original_module.weight", "x.lora_A.weight"]
    assert list(adapter_names.without({k: torch.zeros(1) for k in names})) == list(dict.fromkeys(names))


def test_a_state_dict_of_two_adapters_is_refused() -> None:
    state = {k.format(a): torch.zeros(1) for k in STATE[:2] for a in ("fr", "de")}
    with pytest.raises(FormatError, match=r"state dict with 2 adapters \(de, fr\); save one"):
        adapter_names.without(state)


def test_the_task_and_the_source_of_a_model() -> None:
    llama, bert = models.llama(), models.bert()
    llama.name_or_path = "org/base"
    assert origin.origin(llama, []) == {
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
    }
    assert origin.heads(llama) == [] and origin.heads(bert) == ["classifier"]
    for saved, task in ((["classifier"], "SEQ_CLS"), (["classifier", "bert.pooler"], "SEQ_CLS"), ([], None)):
        named = origin.origin(bert, saved)
        assert named["task_type"] == task and named["base_model_name_or_path"] is None
        library = type(bert).__module__
        mapping = {"base_model_class": "BertForSequenceClassification", "parent_library": library}
        assert named["auto_mapping"] == (None if task else mapping)


def test_a_model_without_text_has_no_task() -> None:
    class AnyForCausalLM(nn.Module):
        main_input_name = "input_features"

    model = AnyForCausalLM()
    model.config = type("Config", (), {"model_type": "any"})()
    assert origin.origin(model, [])["task_type"] is None and origin.heads(model) == []
    del AnyForCausalLM.main_input_name
    assert origin.origin(model, [])["task_type"] == "CAUSAL_LM"
    model.classifier = nn.Linear(2, 2)  # of no task of PEFT's that trains heads
    del model.config
    assert origin.origin(model, [])["task_type"] is None and origin.heads(model) == []


def refused(**config: Any) -> list[str]:
    full = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], **config}
    return refusals.settings_problems({k: v for k, v in full.items() if v != "absent"}, False)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": True}, "r must be a whole number, got True"),
        ({"r": 2.5}, "r must be a whole number, got 2.5"),
        ({"r": None}, "r must be a whole number, got None"),
        ({"lora_alpha": "8"}, "lora_alpha must be a whole number or a number, got '8'"),
        ({"lora_dropout": []}, "lora_dropout must be a whole number or a number or null, got []"),
        ({"bias": 1}, "bias must be text or null, got 1"),
        ({"target_modules": {}}, "target_modules must be text or a list of names or null, got {}"),
        (
            {"target_modules": ["q", 3]},
            "target_modules must be text or a list of names or null, got ['q', 3]",
        ),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names or null, got 'head'"),
        ({"rank_pattern": [1]}, "rank_pattern must be a table or null, got [1]"),
        ({"bias": [9] * 30}, f"bias must be text or null, got {str([9] * 30)[:60]}"),
    ],
)
def test_settings_of_another_type_are_refused(config: dict[str, Any], said: str) -> None:
    assert refused(**config) == [said]


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": [1, 2], "layers_pattern": ["h"], "lora_dropout": 0, "bias": None},
        {"layers_to_transform": 3, "target_modules": "q.*", "alpha_pattern": None},
        {"r": "absent", "lora_alpha": "absent"},
        {"runtime_config": {"a": 1}, "brand_new": None, "other": 0, "use_qalora": False},
        {"megatron_core": "megatron.core", "bias": "all", "target_parameters": ["w"]},
    ],
)
def test_settings_that_are_read(config: dict[str, Any]) -> None:
    assert refused(**config) == []


def test_every_setting_that_cannot_be_read_is_named() -> None:
    found = refused(
        use_qalora=True, brand_new=7, target_modules="(q", rank_pattern={"[": 2}, init_lora_weights="kasa"
    )
    said = (
        "use_qalora=True: the input is pooled in groups (QALoRA); this cannot be read: merge",
        "brand_new=7: a setting of PEFT that is not known here",
        "target_modules='(q' is not a regular expression",
        "'(.*\\\\.)?([)$' is not a regular expression",
        "init_lora_weights 'kasa': it cuts",
    )
    assert len(found) == len(said) and all(f.startswith(s) for f, s in zip(found, said, strict=True))


def test_a_start_is_plain_unless_the_settings_say_otherwise() -> None:
    config = {"peft_type": "LORA", "target_modules": ["q"]}
    assert refusals.settings_problems(config, False) == []
    (said,) = refusals.settings_problems(config, True)
    assert "this adapter's init_lora_weights is True, which does not: leave it out" in said


def test_pairs_alone_hold_less() -> None:
    config = {"peft_type": "LORA", "bias": "all", "lora_bias": False, "target_parameters": ["w"]}
    assert refusals.settings_problems(config, False) == []
    found = refusals.settings_problems(config, False, only_pairs=True)
    assert [f.partition("=")[0] for f in found] == ["target_parameters", "bias"]
    assert refusals.settings_problems({"peft_type": "LORA", "bias": "none"}, False, only_pairs=True) == []


def test_rows_alone_have_their_own_settings() -> None:
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "target_modules": ["e"]}
    assert refusals.settings_problems(config, False) == []
    assert refusals.settings_problems({**config, "lora_bias": True}, False) == [
        "lora_bias=True: a setting of PEFT that is not known here, and may change what the tensors mean"
    ]


def test_types_that_cannot_be_read_say_why() -> None:
    assert refused(peft_type="NEW") == [
        "peft_type 'NEW' is not a type of PEFT 0.21; update Veneer, or merge the adapter in PEFT"
    ]
    (no,) = refused(peft_type="XLORA")
    assert no.startswith("peft_type 'XLORA' cannot be read: it mixes several adapters")
    (convert,) = refused(peft_type="OSF")
    assert convert.startswith("peft_type 'OSF' opens through PEFT's own merge: veneer convert FOLDER")


def test_how_each_type_opens() -> None:
    every = types.every()
    assert list(every) == sorted({*types.NATIVE, *types.CONVERTED, *types.REFUSED})
    by = {t: {n for n, how in every.items() if how.by == t} for t in ("load", "convert", "no")}
    assert by == {"load": types.NATIVE, "convert": {*types.CONVERTED}, "no": {*types.REFUSED}}
    own = {t for t, how in every.items() if how.how.endswith(", for its own base")}
    assert own == {"DEFT", "FROD", "GLORA", "OSF", "PEANUT", "PSOFT", "ROAD", "TINYLORA"}
    assert every["GLORA"].how == "dense, with biases, for its own base" and every["C3A"].how == "dense"
    assert every["XLORA"].how == types.REFUSED["XLORA"] and types.opened("NEW") is None


def test_general_settings_are_those_of_every_type() -> None:
    always, others = settings.general()
    assert {*always} == {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_type"),
        *("revision", "target_modules", "task_type"),
    }
    assert {*others} == {"exclude_modules", "layers_pattern", "layers_to_transform", "peft_version"}
