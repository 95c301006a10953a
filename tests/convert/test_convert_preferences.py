"""Preference stages of axolotl, LLaMA-Factory and TRL, as tasks of ours."""

from __future__ import annotations

import json

import pytest
from support import tiny

from veneer import settings
from veneer.convert.settings import translate
from veneer.data.reading import Reading
from veneer.errors import ConfigError
from veneer.runs.texts import texts
from veneer.tasks import build
from veneer.train.run import Run
from veneer.verbs.convert_config import convert_config

AXOLOTL = {"base_model": "m", "micro_batch_size": 2, "learning_rate": 1e-5, "adapter": "lora", "lora_r": 8}
AXOLOTL |= {"datasets": [{"path": "org/pairs", "split": "train", "type": "chatml.intel"}]}
LF = {"model_name_or_path": "m", "finetuning_type": "lora", "stage": "dpo", "dataset": "pairs"}
TRL = {"model_name_or_path": "m", "dataset_name": "org/pairs", "use_peft": True}

CASES = {
    "axolotl dpo": (AXOLOTL | {"rl": "dpo"}, "dpo", {"beta": 0.1}, {}),
    "axolotl dpo, more": (
        AXOLOTL | {"rl": "dpo", "rl_beta": 0.3, "dpo_label_smoothing": 0.1, "rpo_alpha": 0.5},
        "dpo",
        {"beta": 0.3, "nll": 0.5},
        {"label_smoothing": 0.1},
    ),
    "axolotl ipo": (AXOLOTL | {"rl": "ipo", "dpo_beta": 0.2}, "ipo", {"beta": 0.2}, {}),
    "axolotl orpo": (AXOLOTL | {"rl": "orpo", "orpo_alpha": 0.4}, "orpo", {"beta": 0.4}, {}),
    "axolotl kto": (
        AXOLOTL | {"rl": "kto", "kto_undesirable_weight": 0.2},
        "kto",
        {"beta": 0.1, "undesirable": 0.2},
        {},
    ),
    "axolotl simpo": (
        AXOLOTL | {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0},
        "simpo",
        {"beta": 2.0, "gamma": 1.0},
        {},
    ),
    "lf dpo": (LF, "dpo", {"beta": 0.1}, {}),
    "lf hinge": (LF | {"pref_loss": "hinge", "pref_ftx": 0.1}, "dpo", {"kind": "hinge", "nll": 0.1}, {}),
    "lf ipo": (LF | {"pref_loss": "ipo", "pref_beta": 0.5}, "ipo", {"beta": 0.5}, {}),
    "lf orpo": (LF | {"pref_loss": "orpo"}, "orpo", {"beta": 0.1}, {}),
    "lf simpo": (LF | {"pref_loss": "simpo", "simpo_gamma": 0.7}, "simpo", {"gamma": 0.7}, {}),
    "lf kto": (
        LF | {"stage": "kto", "kto_chosen_weight": 1.5, "kto_rejected_weight": 0.5},
        "kto",
        {"desirable": 1.5, "undesirable": 0.5},
        {},
    ),
    "trl dpo": (TRL | {"beta": 0.2, "loss_type": "robust", "label_smoothing": 0.1}, "dpo",
                {"beta": 0.2, "kind": "robust"}, {"label_smoothing": 0.1, "lr": 1e-6, "length": 1024}),
    "trl mixed": (TRL | {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, "dpo",
                  {"nll": 0.3}, {}),
    "trl ipo": (TRL | {"loss_type": ["ipo"]}, "ipo", {"beta": 0.1}, {}),
    "trl kto": (TRL | {"desirable_weight": 1.2}, "kto", {"desirable": 1.2}, {}),
    "trl simpo": (TRL | {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.6}, "simpo",
                  {"beta": 0.1, "gamma": 0.6}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("values", "task", "options", "more"), CASES.values(), ids=CASES)
def test_a_stage_becomes_a_task(values, task, options, more):
    found = translate(values)
    assert found.settings["task"] == task
    assert options.items() <= found.settings["task_options"].items()
    assert more.items() <= found.settings.items() and not {"packing", "train_on"} & {*found.settings}
    known = {"datasets[0].type", "dataset"}
    assert {u.key for u in found.uncarried} <= known
    run = Run.from_dict({"data": ("x",), **found.settings})  # every setting is ours
    assert run.task == task


def test_a_trainer_of_trl_may_be_named():
    for stage, task in (("kto", "kto"), ("orpo", "orpo"), ("dpo", "dpo")):
        assert translate({**TRL, "beta": 0.3}, f"trl-{stage}").settings["task"] == task
    (note,) = [n for n in translate({**TRL, "beta": 0.3}).notes if "trl-orpo" in n]
    assert note.startswith("the file is read as one of trl dpo")
    assert "task" not in translate(TRL).settings


@pytest.mark.parametrize(
    ("values", "tool", "text"),
    [
        (AXOLOTL | {"rl": "dpoo"}, None, "rl must be dpo, ipo, orpo, kto, simpo, got 'dpoo'; did you mean"),
        (AXOLOTL | {"reward_model": True}, None, "axolotl: reward models are unsupported"),
        (LF | {"pref_loss": "kto_pair"}, None, "pref_loss must be sigmoid, hinge, ipo, orpo, simpo, got"),
        (TRL | {"loss_type": ["sigmoid", "bco_pair"], "beta": 0.1}, None, "loss_type must be sigmoid, hinge"),
        (TRL | {"loss_type": "hinge"}, "trl-cpo", "loss_type of cpo must be simpo, got 'hinge'"),
        (TRL, "trl-cpo", "loss_type of cpo must be simpo, got 'sigmoid'"),
        (TRL | {"loss_type": "apo_zero_unpaired"}, "trl-kto", "loss_type of kto must be kto, got"),
    ],
)
def test_losses_without_a_counterpart_are_refused(values, tool, text):
    with pytest.raises(ConfigError, match=text):
        translate(values, tool)


def test_a_second_model_as_reference_is_listed():
    found = translate(LF | {"ref_model": "other"})
    assert ("ref_model", "other") in [(u.key, u.value) for u in found.uncarried]


def test_a_ranking_of_llama_factory_is_read_whole(tmp_path):
    """From its file and its dataset_info.json to the rows of our task."""
    (tmp_path / "data").mkdir()
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    talk = {"formatting": "sharegpt", "ranking": True, "columns": {**columns, "messages": "talk"}}
    talk["columns"].pop("prompt")
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "you"}
    info = {
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
        "talks": {"file_name": "talks.json", **talk, "tags": tags},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    rows = [{"ask": "Q", "good": "A", "bad": "B"}]
    (tmp_path / "data" / "pairs.json").write_text(json.dumps(rows))
    turn = [{"who": who, "what": what} for who, what in (("me", "Q"), ("you", "A"), ("you", "B"))]
    (tmp_path / "data" / "talks.json").write_text(
        json.dumps([{"talk": turn[:1], "good": turn[1], "bad": turn[2]}])
    )
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text(json.dumps({**LF, "dataset": "pairs,talks"}))
    done = convert_config(str(theirs), out=str(tmp_path / "ours.yaml"))
    assert not done.problems and not done.translation.uncarried
    run = Run.from_dict(settings.read_yaml((tmp_path / "ours.yaml").read_text(), "ours"))
    pair, spoken = texts.read(run, ("train",))["train"]
    assert pair.columns == {"instruction": "Q", "chosen": "A", "rejected": "B"}
    assert spoken.columns["chosen"] == {"from": "gpt", "value": "A"}
    for text in (pair, spoken):
        own = build("dpo", tiny.tokenizer(), Reading(length=64)).encode(text).content
        assert tiny.tokenizer().decode(own.answers[1].ids).startswith("B")
