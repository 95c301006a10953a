"""TRL's trainers on adapted models: references without a second copy, losses as of our tasks, GRPO."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import models, tiny

import veneer
from veneer.adapt.attached import base_parameters, changes
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError
from veneer.integrations.checkpoint import STATE
from veneer.integrations.optimisers import build_optimiser
from veneer.integrations.trainer import adapter_trainer
from veneer.tasks import build

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
ROWS = [
    {"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran"},
    {"prompt": "seven dogs ran", "chosen": " round", "rejected": " in the old house"},
    {"prompt": "the moon", "chosen": " and the rain", "rejected": " while"},
]


def language_model(seed=0):
    return veneer.attach(models.llama(seed, vocab_size=len(tiny.tokenizer())), "lora", rank=2)


def common(folder, **changed):
    own = {"per_device_train_batch_size": 3, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    own |= {"learning_rate": 0.01, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    own |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "gradient_checkpointing": False}
    return {**own, "output_dir": str(folder), **changed}


def trainer_of(kind, args, rows=ROWS, optimiser=None, **given):
    return adapter_trainer(kind, optimiser)(
        model=language_model(),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        **given,
    )


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def seen_by(trainer):
    """Every batch that the trainer learns from."""
    found, inner = [], trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (
        found.append(copy.deepcopy(inputs)) or inner(model, inputs, *rest)
    )
    return found


def ours(batches, loss, **options):
    """The losses of our loop on the same batches, from the same start."""
    model, found = language_model().train(), []
    optimiser = build_optimiser(model, "loraplus", lr=0.01, ratio=4)
    for batch in batches:
        total, n = loss(model, batch)
        (total / n).backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append((total / n).item())
    return found


def shifted(ids, learned):
    """Batches of TRL as ours: labels one place earlier."""
    labels = torch.where(learned.bool(), ids, -100)
    return {"input_ids": ids[:, :-1], "labels": labels[:, 1:]}


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "robust"])
def test_dpos_losses_are_those_of_our_task(tmp_path, kind):
    smoothing = 0.1 if kind == "robust" else 0.0
    args = trl.DPOConfig(**common(tmp_path, max_length=32, loss_type=[kind], label_smoothing=smoothing))
    trainer = trainer_of(trl.DPOTrainer, args, optimiser="loraplus")
    trainer.optimiser_options = {"ratio": 4}
    batches = seen_by(trainer)
    trainer.train()
    options = {} if kind == "ipo" else {"kind": kind}
    task = build("ipo" if kind == "ipo" else "dpo", tiny.tokenizer(), Reading(length=32), options)
    mine = ours(
        [shifted(b["input_ids"], b["completion_mask"]) for b in batches],
        lambda model, batch: task.loss(model, batch, smoothing=smoothing),
    )
    assert mine == pytest.approx(losses(trainer), rel=1e-5, abs=1e-5)
    assert abs(mine[-1] - mine[0]) > 1e-3


def test_our_rows_are_trls_tokens(tmp_path):
    args = trl.DPOConfig(**common(tmp_path, max_length=32, max_steps=1))
    trainer = trainer_of(trl.DPOTrainer, args)
    batches = seen_by(trainer)
    trainer.train()
    task = build("dpo", tiny.tokenizer(), Reading(length=32))
    for theirs in batches:
        rows = {
            tuple(i[m.bool()].tolist())
            for i, m in zip(theirs["input_ids"], theirs["completion_mask"], strict=True)
        }
        every = [p for r in ROWS for p in task.pieces(task.encode(Row("prompt-pairs", r, "here")), 32)]
        assert rows == {tuple(e[name].tolist()) for e in every for name in ("chosen", "rejected")}


def test_sfts_losses_are_those_of_our_task(tmp_path):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]
    trainer = trainer_of(trl.SFTTrainer, trl.SFTConfig(**common(tmp_path, max_length=32)), rows, "loraplus")
    trainer.optimiser_options = {"ratio": 4}
    batches = seen_by(trainer)
    trainer.train()
    task = build("causal-lm", tiny.tokenizer(), Reading(length=32))
    mine = ours([shifted(b["input_ids"], b["labels"] != -100) for b in batches], task.loss)
    assert mine == pytest.approx(losses(trainer), rel=1e-5, abs=1e-5)


def test_a_reference_is_made_without_a_second_copy(tmp_path):
    trainer = trainer_of(trl.DPOTrainer, trl.DPOConfig(**common(tmp_path, max_length=32)))
    own = {p.data_ptr() for p in trainer.model.parameters()}
    assert {p.data_ptr() for p in trainer.ref_model.parameters()} <= own
    before = {n: p.clone() for n, p in base_parameters(trainer.model).items()}
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(2), abs=1e-4) and found[-1] < found[0] - 1e-3
    assert all(torch.equal(p, before[n]) for n, p in base_parameters(trainer.model).items())
    assert (tmp_path / "checkpoint-4" / STATE).is_file()
    assert not list((tmp_path / "checkpoint-4").glob("model*"))


def test_dpo_resumes_where_it_was(tmp_path):
    whole = trainer_of(trl.DPOTrainer, trl.DPOConfig(**common(tmp_path / "a", max_length=32)))
    whole.train()
    again = trainer_of(trl.DPOTrainer, trl.DPOConfig(**common(tmp_path / "b", max_length=32)))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (_, a), (_, b) in zip(changes(whole.model, "default"), changes(again.model, "default"), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_kto_starts_at_the_reference(tmp_path):
    rows = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r in ROWS
        for side in ("chosen", "rejected")
    ]
    args = trl.KTOConfig(**common(tmp_path, max_length=32, per_device_train_batch_size=6))
    trainer = trainer_of(trl.KTOTrainer, args, rows)
    own = {p.data_ptr() for p in trainer.model.parameters()}
    assert {p.data_ptr() for p in trainer.ref_model.parameters()} <= own
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(0.5, abs=1e-4) and found[-1] < found[0] - 1e-3


def spaces(completions, **rest):
    """A rule: the share of characters that are spaces."""
    return [text.count(" ") / max(1, len(text)) for text in completions]


def grpo(folder, **changed):
    own = {"max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 8}
    own |= {"max_steps": 2, "save_steps": 2, "temperature": 1.0, "seed": 3}
    return trl.GRPOConfig(**common(folder, **{**own, **changed}))


def test_grpo_keeps_to_the_base_without_a_second_copy(tmp_path):
    args = grpo(tmp_path, beta=0.5)
    trainer = trainer_of(trl.GRPOTrainer, args, [{"prompt": r["prompt"]} for r in ROWS], reward_funcs=spaces)
    assert args.beta == trainer.beta == 0.5
    own = {p.data_ptr() for p in trainer.model.parameters()}
    assert {p.data_ptr() for p in trainer.ref_model.parameters()} <= own
    trainer.train()
    kl = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-7
    assert (tmp_path / "checkpoint-2" / STATE).is_file()


def test_grpo_without_an_effect_of_the_adapter_is_refused(tmp_path):
    args = grpo(tmp_path)
    args.use_vllm = True
    with pytest.raises(ConfigError, match="use_vllm would send vLLM the base without its adapters"):
        trainer_of(trl.GRPOTrainer, args, [{"prompt": "a"}], reward_funcs=spaces)


def test_twenty_steps_of_grpo_raise_a_rules_reward(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from veneer.embedded import folder

    def rule(completions, **rest):
        return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

    args = grpo(tmp_path, max_steps=20, save_strategy="no", num_generations=8, learning_rate=3e-3)
    model = veneer.attach(AutoModelForCausalLM.from_pretrained(folder(), dtype="float32"), "lora", rank=8)
    trainer = adapter_trainer(trl.GRPOTrainer)(
        model=model,
        args=args,
        reward_funcs=rule,
        train_dataset=datasets.Dataset.from_list([{"prompt": f"x_{i} = "} for i in range(64)]),
        processing_class=AutoTokenizer.from_pretrained(folder()),
    )
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
