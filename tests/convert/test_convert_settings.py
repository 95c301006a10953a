"""Run configurations of other programs as ours: what is carried, what is not, and nothing in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support import models

from veneer.convert.settings import execution, tool_of, translate
from veneer.errors import ConfigError
from veneer.settings import read_yaml
from veneer.train import track
from veneer.train.run import Run
from veneer.verbs.convert_config import convert_config, text

AXOLOTL = """
base_model: NousResearch/Llama-2-7b-hf
load_in_4bit: true
strict: false
datasets:
  - path: chats.jsonl
    type: chat_template
test_datasets:
  - path: held-out.jsonl
dataset_prepared_path:
val_set_size: 0
output_dir: ./outputs/lora-out
sequence_len: 4096
sample_packing: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
peft_use_rslora: true
lora_modules_to_save: [embed_tokens]
wandb_project: mine
gradient_accumulation_steps: 4
micro_batch_size: 2
max_steps: 500
num_epochs: 4
optimizer: adamw_bnb_8bit
loraplus_lr_ratio: 16
lr_scheduler: constant_with_warmup
learning_rate: 2e-4
train_on_inputs: true
bf16: true
tf32: false
gradient_checkpointing: true
warmup_steps: 10
eval_steps: 50
saves_per_epoch: 1
save_total_limit: 1
weight_decay: 0.1
lora_fan_in_fan_outt: true
"""
AXOLOTL_SETTINGS = {
    "model": "NousResearch/Llama-2-7b-hf",
    "data": ("chats.jsonl",),
    "valid": ("held-out.jsonl",),
    "out": "./outputs/lora-out",
    "method": "lora",
    "to": "all-linear",
    "quantise": "nf4",
    "options": {"rank": 32, "alpha": 16, "dropout": 0.05, "stabilised": True},
    "batch": 2,
    "accumulate": 4,
    "length": 4096,
    "packing": True,
    "train_on": "all",
    "seed": 42,
    "optimiser": "loraplus",
    "optimiser_options": {"ratio": 16.0},
    "lr": 2e-4,
    "weight_decay": 0.1,
    "clip": 1.0,
    "schedule": "constant",
    "steps": 500,
    "warmup": 10.0,
    "precision": "bf16",
    "eval_every": 50,
    "keep": 2,
    "gradient_checkpointing": True,
    "track": ("wandb",),
}
AXOLOTL_LEFT = {
    "datasets[0].type": "Veneer infers the format of rows from columns",
    "optimizer": "Veneer's AdamW keeps its state in 32 bits",
    "lora_modules_to_save": "Veneer does not fully train modules beside adapters",
    "saves_per_epoch": "Veneer saves every save_every steps; set save_every",
    "wandb_project": "a run is named after its folder",
    "lora_fan_in_fan_outt": "unknown setting; did you mean 'lora_fan_in_fan_out'?",
}

LLAMAFACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
use_dora: true
pissa_init: true
dataset_dir: data
dataset: identity,elsewhere
template: llama3
cutoff_len: 2048
output_dir: saves/llama3-8b/lora/sft
save_steps: 500
plot_loss: true
packing: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
label_smoothing_factor: 0.1
fp16: true
resume_from_checkpoint: null
"""
LLAMAFACTORY_SETTINGS = {
    "model": "meta-llama/Meta-Llama-3-8B-Instruct",
    "data": ("{folder}/data/identity.json",),
    "out": "saves/llama3-8b/lora/sft",
    "method": "dora",
    "to": ("q_proj", "v_proj"),
    "options": {"rank": 16, "alpha": 32, "init": "pissa"},
    "lr": 1e-4,
    "batch": 1,
    "accumulate": 8,
    "length": 2048,
    "packing": True,
    "train_on": "completion",
    "seed": 42,
    "weight_decay": 0.0,
    "clip": 1.0,
    "label_smoothing": 0.1,
    "schedule": "cosine",
    "epochs": 3.0,
    "warmup": 0.1,
    "save_every": 500,
}
LLAMAFACTORY_LEFT = {
    "dataset": "{folder}/data/dataset_info.json does not list this name",
    "pissa_iter": "the iterations of PiSSA's randomised SVD are fixed",
    "fp16": "Veneer trains in bf16 or fp32",
    "template": "the tokenizer's own chat template is used",
}

TORCHTUNE = """
output_dir: /tmp/torchtune/out
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
  use_dora: True
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /tmp/llama/tokenizer.model
  max_seq_len: 1024
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /tmp/llama
  checkpoint_files: [model.safetensors]
  output_dir: ${output_dir}
  model_type: LLAMA3
dataset:
  _component_: torchtune.datasets.chat_dataset
  source: json
  data_files: chats.jsonl
  packed: True
seed: 7
shuffle: True
batch_size: 2
optimizer:
  _component_: torch.optim.AdamW
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
epochs: 2
max_steps_per_epoch: 500
gradient_accumulation_steps: 8
clip_grad_norm: null
compile: True
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
device: cuda
dtype: bf16
"""
TORCHTUNE_SETTINGS = {
    "model": "/tmp/llama",
    "data": ("chats.jsonl",),
    "out": "/tmp/torchtune/out",
    "method": "dora",
    "to": ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"),
    "options": {"rank": 8, "alpha": 16},
    "lr": 3e-4,
    "batch": 2,
    "accumulate": 8,
    "length": 1024,
    "packing": True,
    "train_on": "completion",
    "seed": 7,
    "weight_decay": 0.01,
    "clip": 0.0,
    "schedule": "cosine",
    "steps": 1000,
    "warmup": 100.0,
    "precision": "bf16",
    "device": "cuda",
}
TORCHTUNE_LEFT = {
    "dataset._component_": "Veneer infers the format of rows from columns; name files in data=",
    "tokenizer._component_": "the base model's own tokenizer is used",
    "tokenizer.path": "the base model's own tokenizer is used",
}

MLX = """
model: "mlx-community/Llama-3.2-1B-Instruct"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    weight_decay: 0.05
data: "data"
num_layers: 8
batch_size: 4
iters: 1000
grad_accumulation_steps: 2
steps_per_report: 10
steps_per_eval: 200
save_every: 100
max_seq_length: 1024
mask_prompt: true
report_to: wandb
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 50
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""
MLX_SETTINGS = {
    "model": "mlx-community/Llama-3.2-1B-Instruct",
    "data": ("{folder}/data/train.jsonl",),
    "valid": ("{folder}/data/valid.jsonl",),
    "out": "adapters",
    "method": "lora",
    "to": ("self_attn.q_proj", "self_attn.v_proj"),
    "options": {"rank": 8, "alpha": 160.0, "dropout": 0.1},
    "lr": 1e-5,
    "betas": (0.9, 0.98),
    "batch": 4,
    "accumulate": 2,
    "steps": 500,
    "length": 1024,
    "packing": False,
    "train_on": "completion",
    "seed": 0,
    "weight_decay": 0.05,
    "clip": 0.0,
    "schedule": "cosine",
    "warmup": 50.0,
    "eval_every": 100,
    "save_every": 50,
    "track": ("wandb",),
}
MLX_LEFT = {
    "num_layers": "the last layers depend on the model; choose them by an expression in to=",
    "lr_schedule.warmup_init": "Veneer's warm-up starts at 0",
}

V1 = """
model: Qwen/Qwen3-4B
trust_remote_code: true
model_class: llm
template: qwen3_nothink
peft_config:
  name: lora
  r: 16
  lora_alpha: 32
  lora_dropout: 0.05
  target_modules: all
dist_config:
  name: fsdp2
train_dataset: data/v1_sft_demo.yaml
output_dir: outputs/test_lora
micro_batch_size: 2
global_batch_size: 8
cutoff_len: 1024
learning_rate: 1.0e-4
bf16: false
max_steps: 10
"""
V1_SETTINGS = {
    "model": "Qwen/Qwen3-4B",
    "data": ("data/identity.json",),
    "out": "outputs/test_lora",
    "method": "lora",
    "to": "all-linear",
    "options": {"rank": 16, "alpha": 32, "dropout": 0.05},
    "lr": 1e-4,
    "batch": 2,
    "accumulate": 4,
    "length": 1024,
    "seed": 42,
    "weight_decay": 0.0,
    "clip": 1.0,
    "schedule": "cosine",
    "steps": 10,
    "warmup": 0.0,
    "precision": "fp32",
}
V1_LEFT = {
    "train_dataset.identity.converter": "Veneer infers the format of rows from columns",
    "train_dataset.identity.size": "not supported by Veneer",
    "trust_remote_code": "not supported by Veneer",
    "template": "the tokenizer's own chat template is used",
    "dist_config.name": "Veneer trains on one device",
}

TRL = """
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: trl-lib/Capybara
dataset_config: plain
use_peft: true
lora_r: 32
lora_target_modules: q_proj v_proj
use_dora: true
load_in_4bit: true
max_length: 2048
packing: true
num_train_epochs: 1
learning_rate: 2.0e-4
gradient_accumulation_steps: 8
warmup_steps: 20
eval_strategy: steps
eval_steps: 100
neftune_noise_alpha: 5
lora_modules_to_save: [lm_head]
dataset_num_proc: 4
output_dir: Qwen2-0.5B-SFT
report_to: none
logging_steps: 25
"""
TRL_SETTINGS = {
    "model": "Qwen/Qwen2-0.5B",
    "out": "Qwen2-0.5B-SFT",
    "data": ("trl-lib/Capybara:plain:train",),
    "valid": ("trl-lib/Capybara:plain:test",),
    "quantise": "nf4",
    "method": "dora",
    "to": ("q_proj", "v_proj"),
    "options": {"rank": 32, "alpha": 32, "dropout": 0.05},
    "length": 2048,
    "packing": True,
    "train_on": "completion",
    "lr": 2e-4,
    "batch": 8,
    "accumulate": 8,
    "seed": 42,
    "weight_decay": 0.0,
    "clip": 1.0,
    "schedule": "linear",
    "epochs": 1.0,
    "warmup": 20.0,
    "eval_every": 100,
    "neftune": 5.0,
    "gradient_checkpointing": True,
}
TRL_LEFT = {
    "lora_modules_to_save": "Veneer does not fully train modules beside adapters",
    "dataset_num_proc": "rows are read by one process",
    "logging_steps": "Veneer logs every step",
}

UNSLOTH = """
model_name: unsloth/Llama-3.2-1B
max_seq_length: 4096
load_in_4bit: true
dataset: chats.jsonl
r: 8
lora_alpha: 8
use_gradient_checkpointing: unsloth
random_state: 3407
use_rslora: true
per_device_train_batch_size: 4
warmup_steps: 5
max_steps: 60
learning_rate: 2e-4
optim: adamw_8bit
save_method: merged_16bit
save_model: true
"""
UNSLOTH_SETTINGS = {
    "model": "unsloth/Llama-3.2-1B",
    "out": "outputs",
    "data": ("chats.jsonl",),
    "length": 4096,
    "packing": False,
    "quantise": "nf4",
    "method": "lora",
    "to": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "options": {"rank": 8, "alpha": 8, "dropout": 0.0, "stabilised": True},
    "lr": 2e-4,
    "batch": 4,
    "accumulate": 4,
    "seed": 3407,
    "weight_decay": 0.01,
    "clip": 1.0,
    "schedule": "linear",
    "steps": 60,
    "warmup": 5.0,
    "gradient_checkpointing": True,
}
UNSLOTH_LEFT = {
    "optim": "Veneer's AdamW keeps its state in 32 bits",
    "save_method": "export the trained adapter by `veneer export`",
    "save_model": "export the trained adapter by `veneer export`",
}

FILES = {
    "llamafactory-v1": (V1, V1_SETTINGS, V1_LEFT),
    "trl": (TRL, TRL_SETTINGS, TRL_LEFT),
    "unsloth": (UNSLOTH, UNSLOTH_SETTINGS, UNSLOTH_LEFT),
    "axolotl": (AXOLOTL, AXOLOTL_SETTINGS, AXOLOTL_LEFT),
    "llamafactory": (LLAMAFACTORY, LLAMAFACTORY_SETTINGS, LLAMAFACTORY_LEFT),
    "torchtune": (TORCHTUNE, TORCHTUNE_SETTINGS, TORCHTUNE_LEFT),
    "mlx": (MLX, MLX_SETTINGS, MLX_LEFT),
}


def placed(value, folder: Path):
    """{folder} in a golden value as the folder of the test."""
    if isinstance(value, tuple):
        return tuple(placed(v, folder) for v in value)
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


@pytest.fixture
def folder(tmp_path):
    """Files that the configurations name."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(
        json.dumps({"identity": {"file_name": "identity.json"}})
    )
    (tmp_path / "data" / "v1_sft_demo.yaml").write_text(
        "identity: {path: data/identity.json, source: local, converter: alpaca, size: 500}\n"
    )
    for part in ("train", "valid"):
        (tmp_path / "data" / f"{part}.jsonl").write_text('{"text": "x"}\n')
    return tmp_path


@pytest.mark.parametrize("tool", sorted(FILES))
def test_what_is_carried_and_what_is_not(folder, tool):
    source, settings, left = FILES[tool]
    values = read_yaml(source, tool)
    assert tool_of(values) == tool
    found = translate(values, folder=folder)
    assert found.settings == {k: placed(v, folder) for k, v in settings.items()}
    assert {u.key: u.why for u in found.uncarried} == {k: placed(v, folder) for k, v in left.items()}
    assert Run.from_dict(found.settings).method == settings["method"]


@pytest.mark.parametrize("tool", sorted(FILES))
def test_every_key_of_the_file_is_accounted_for(folder, tool):
    """Each leaf, given another name, becomes uncarried: nothing is read by chance or dropped."""
    values = read_yaml(FILES[tool][0], tool)
    strange = {"entirely_new_setting": 3, "optimizer_confing": {"deep": {"er": True}}}
    found = translate({**values, **strange}, folder=folder)
    assert {"entirely_new_setting", "optimizer_confing.deep.er"} <= {u.key for u in found.uncarried}


def test_what_the_programs_do_in_silence():
    """Defaults of the other program where the file says nothing, not ours."""
    mlx = translate({"model": "m", "fine_tune_type": "lora", "data": "d", "iters": 10}).settings
    assert (
        mlx["options"] == {"rank": 8, "alpha": 160.0}
        and mlx["lr"] == 1e-5
        and mlx["weight_decay"] == 0.0
        and mlx["warmup"] == 0.0
    )
    lf = translate(
        {"model_name_or_path": "m", "stage": "pt", "finetuning_type": "lora", "template": "x"}
    ).settings
    assert (
        lf["options"] == {"rank": 8, "alpha": 16}
        and lf["packing"]
        and lf["train_on"] == "all"
        and lf["epochs"] == 3.0
    )
    axolotl = translate(
        {"base_model": "m", "datasets": [{"path": "a.jsonl"}], "learning_rate": 1e-3, "micro_batch_size": 1}
    ).settings
    assert axolotl["method"] == "full" and axolotl["length"] == 512 and not axolotl["packing"]


LISTED = {
    "plain": {"file_name": "a.json"},
    "hub": {"hf_hub_url": "org/name"},
    "subset": {"hf_hub_url": "org/name", "subset": "en", "split": "test"},
    "few": {"file_name": "a.json", "num_samples": 10},
    "columns": {"file_name": "a.json", "columns": {"prompt": "q", "response": "a"}},
    "tags": {"file_name": "a.json", "formatting": "sharegpt", "tags": {"role_tag": "role"}},
    "ranked": {"file_name": "a.json", "ranking": True, "columns": {"chosen": "c", "rejected": "r"}},
}


def test_entries_of_dataset_info_are_carried_whole(folder):
    """A plain entry by its file; all that say more by name, so that Veneer reads the entry itself."""
    path = folder / "data" / "dataset_info.json"
    path.write_text(json.dumps(LISTED))
    given = {"model_name_or_path": "m", "stage": "sft", "finetuning_type": "lora"}
    found = translate({**given, "dataset": ",".join(LISTED)}, folder=folder)
    by_name = [f"{path}:{name}" for name in list(LISTED)[2:]]
    assert found.settings["data"] == (str(folder / "data" / "a.json"), "org/name", *by_name)
    refused = "of another task; Veneer refuses this data set"
    assert [(u.key, u.why) for u in found.uncarried if u.key.startswith("dataset.")] == [
        (f"dataset.ranked.{key}", refused) for key in ("ranking", "chosen", "rejected")
    ]


AXOLOTL_LEAST = {"base_model": "m", "micro_batch_size": 1, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("entry", "source", "left"),
    [
        ({"path": "org/x", "name": "en", "split": "train[:10%]"}, "org/x:en:train[:10%]", []),
        ({"path": "json", "data_files": "a.jsonl", "ds_type": "json"}, "a.jsonl", []),
        ({"path": "a.jsonl", "split": "train", "shards": 4}, "a.jsonl", ["split", "shards"]),
        (
            {"path": "org/x", "field_messages": "talk", "type": "chat_template"},
            "org/x",
            ["field_messages", "type"],
        ),
    ],
)
def test_parts_of_axolotls_data_are_carried_or_listed(entry, source, left):
    found = translate({**AXOLOTL_LEAST, "datasets": [entry], "val_set_size": 0.05})
    assert found.settings["data"] == (source,) and "valid" not in found.settings
    assert [u.key for u in found.uncarried] == [*(f"datasets[0].{key}" for key in left), "val_set_size"]


def test_no_validation_means_none():
    axolotl = translate({**AXOLOTL_LEAST, "datasets": [{"path": "a.jsonl"}], "val_set_size": 0})
    lf = translate({"model_name_or_path": "m", "stage": "sft", "finetuning_type": "lora", "val_size": 0.0})
    assert axolotl.settings["valid"] == lf.settings["valid"] == ("none",)
    assert not axolotl.uncarried and not lf.uncarried


def test_galore_and_parts_of_the_base():
    options = {"rank": 64, "update_proj_gap": 100, "scale": 0.5}
    given = {"optimizer": "galore_adamw", "optim_args": options, "optim_target_modules": ["mlp"]}
    axolotl = translate({**AXOLOTL_LEAST, **given, "unfrozen_parameters": ["^lm_head"]})
    own = {"optimiser": "galore", "optimiser_options": {"rank": 64, "period": 100, "scale": 0.5}}
    assert own.items() <= axolotl.settings.items()
    assert [u.key for u in axolotl.uncarried] == ["optim_target_modules", "unfrozen_parameters"]
    lf = translate(
        {"model_name_or_path": "m", "stage": "sft", "finetuning_type": "full", "use_galore": True,
         "galore_rank": 64, "galore_update_interval": 100, "galore_scale": 0.5, "galore_target": "all"}
    )  # fmt: skip
    assert own.items() <= lf.settings.items() and [u.key for u in lf.uncarried] == ["galore_target"]
    assert Run.from_dict({**lf.settings, "data": "x"}).optimiser == "galore"


def test_the_last_layers_of_mlx(folder):
    values = read_yaml(MLX, "mlx")
    found = translate(values, folder=folder, layers=10)
    assert found.settings["to"] == r".*\.(2|3|4|5|6|7|8|9)\.(self_attn\.q_proj|self_attn\.v_proj)"
    assert "num_layers" not in {u.key for u in found.uncarried}
    assert "num_layers" not in {
        u.key for u in translate({**values, "num_layers": -1}, folder=folder).uncarried
    }


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"base_model": "m", "micro_batch_size": 1, "rl": "grpo"},
            "axolotl: rl must be dpo, ipo, orpo, kto, simpo, got 'grpo'",
        ),
        (
            {"base_model": "m", "micro_batch_size": 1, "adapter": "llama-adapter"},
            "axolotl: adapter must be lora, qlora or empty, got 'llama-adapter'",
        ),
        (
            {"stage": "ppo", "finetuning_type": "lora"},
            "LLaMA-Factory: stage must be sft, pt, dpo or kto, got",
        ),
        (
            {"stage": "sft", "finetuning_type": "oft"},
            "LLaMA-Factory: finetuning_type must be lora or full, got 'oft'",
        ),
        (
            {"fine_tune_type": "lorra", "iters": 1},
            "mlx-lm: fine_tune_type must be lora, dora or full, got 'lorra'",
        ),
        (
            {"model": {"_component_": "x.lora_y", "lora_attn_modules": ["qproj"]}},
            "unknown attention module 'qproj'; did you mean 'q_proj'",
        ),
        (
            {"model": {"_component_": "x.lora_y"}, "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}},
            "torchtune: training must be supervised, got a preference recipe",
        ),
        (
            {"rank": 4},
            "is ambiguous; name it with tool=: axolotl, llamafactory, llamafactory-v1, torchtune, mlx, trl",
        ),
    ],
)
def test_what_is_not_translated(values, text):
    with pytest.raises(ConfigError, match=text):
        translate(values)


def test_an_unknown_program():
    with pytest.raises(ConfigError, match="unknown program 'axolotle'; did you mean 'axolotl'"):
        translate({"base_model": "m"}, "axolotle")


def test_the_new_file_says_what_is_missing_from_it(folder):
    (folder / "theirs.yaml").write_text(LLAMAFACTORY.replace("identity,elsewhere", "elsewhere"))
    done = convert_config(str(folder / "theirs.yaml"), out=str(folder / "ours.yaml"))
    (problem,) = done.problems
    assert problem.startswith("data must be given: texts to learn from: files")
    written = (folder / "ours.yaml").read_text()
    assert written.startswith(
        "# made from theirs.yaml of llamafactory\n# not carried: dataset: 'elsewhere' ("
    )
    assert "\n# to do: data must be given" in written
    assert yaml.safe_load(written)["options"] == {"rank": 16, "alpha": 32, "init": "pissa"}
    assert f"of llamafactory carried, in {folder / 'ours.yaml'}\n- not carried: dataset" in text(done)
    assert json.loads(json.dumps(done.as_dict()))["tool"] == "llamafactory"
    with pytest.raises(ConfigError, match=r"ours\.yaml exists; choose another or remove it"):
        convert_config(str(folder / "theirs.yaml"), out=str(folder / "ours.yaml"))
    with pytest.raises(ConfigError, match="does not exist"):
        convert_config(str(folder / "none.yaml"))


def test_the_new_file_can_be_run_from(folder):
    # as mlx-lm leaves it with its adapter
    (folder / "theirs.json").write_text(json.dumps(read_yaml(MLX, "mlx")))
    models.llama().config.to_json_file(folder / "config.json")
    done = convert_config(
        str(folder / "theirs.json"), out=str(folder / "ours.yaml"), tool="mlx", model=str(folder)
    )
    assert done.problems == [] and Run.from_yaml(folder / "ours.yaml").options["alpha"] == 160.0


@pytest.mark.parametrize(
    ("tool", "text", "given", "carried", "said"),
    [
        (
            "axolotl",
            AXOLOTL,
            {"gradient_checkpointing": "offload"},
            {"gradient_checkpointing": True},
            "gradient_checkpointing 'offload'",
        ),
        ("axolotl", AXOLOTL, {"torch_compile": False}, {"compile": "off"}, None),
        ("axolotl", AXOLOTL, {"torch_compile": "max"}, {}, "compile must be auto, on or off"),
        (
            "axolotl",
            AXOLOTL,
            {"datasets": None, "pretraining_dataset": [{"path": "web.jsonl"}]},
            {"stream": True, "steps": 500},
            None,
        ),
        (
            "axolotl",
            AXOLOTL,
            {"streaming": True, "max_steps": None},
            {"epochs": 4.0},
            "streaming needs a number of steps",
        ),
        (
            "axolotl",
            AXOLOTL,
            {"use_tensorboard": True},
            {"track": ("tensorboard", "wandb")},
            "tensorboard, wandb; Veneer logs without a network",
        ),
        (
            "llamafactory",
            LLAMAFACTORY,
            {"report_to": ["swanlab", "mlflow"]},
            {"track": ("mlflow",)},
            "unsupported tracker; supported: mlflow,",
        ),
        (
            "llamafactory",
            LLAMAFACTORY,
            {"streaming": True, "max_steps": 9, "buffer_size": 99},
            {"stream": True},
            "set buffer",
        ),
        (
            "torchtune",
            TORCHTUNE,
            {"compile": False, "enable_activation_checkpointing": True},
            {"compile": "off"},
            None,
        ),
        ("mlx", MLX, {"grad_checkpoint": True, "report_to": None}, {"gradient_checkpointing": True}, None),
    ],
)
def test_how_a_training_is_carried_out(tool, text, given, carried, said, tmp_path):
    found = translate({**yaml.safe_load(text), **given}, tool, folder=tmp_path)
    assert carried.items() <= found.settings.items() and ("stream" in found.settings) == ("stream" in carried)
    assert said is None or any(said in line for line in [*found.notes, *(u.why for u in found.uncarried)])
    assert not any(u.key in given and u.why.startswith("unknown") for u in found.uncarried)
    Run.from_dict({"data": "x", **found.settings})


def test_the_trackers_that_are_carried_are_those_there_are():
    assert execution.TRACKERS == tuple(track.available())


@pytest.mark.parametrize(
    ("tool", "text", "given", "quantise", "left"),
    [
        ("axolotl", AXOLOTL, {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, "int8", None),
        (
            "axolotl",
            AXOLOTL,
            {"adapter": None},
            None,
            "load_in_4bit: full fine-tuning needs an unquantised base",
        ),
        ("llamafactory", LLAMAFACTORY, {"quantization_bit": 4}, "nf4", None),
        ("llamafactory", LLAMAFACTORY, {"quantization_bit": 8}, "int8", None),
        (
            "llamafactory",
            LLAMAFACTORY,
            {"quantization_bit": 2},
            None,
            "quantization_bit: Veneer quantises to 4 or 8 bits",
        ),
        (
            "llamafactory",
            LLAMAFACTORY,
            {"finetuning_type": "full", "quantization_bit": 4},
            None,
            "quantization_bit: full",
        ),
    ],
)
def test_quantised_bases_are_carried_and_else_said(tool, text, given, quantise, left, tmp_path):
    found = translate({**yaml.safe_load(text), **given}, tool, folder=tmp_path)
    told = [f"{u.key}: {u.why}" for u in found.uncarried if "load_in" in u.key or "quantization" in u.key]
    assert found.settings.get("quantise") == quantise
    assert (told == []) if left is None else (len(told) == 1 and told[0].startswith(left))
