"""Trainers of transformers and TRL on adapted models: checkpoints, resuming, optimisers, references."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import models, tiny
from transformers import Trainer, TrainingArguments

import veneer
from veneer.adapt.attached import base_parameters, changes
from veneer.errors import ConfigError, FormatError
from veneer.integrations.reference import reference
from veneer.integrations.trainer import STATE, adapter_trainer, build

ROWS = 24


class Ids(torch.utils.data.Dataset):
    """Rows of eight random tokens, which are their own labels."""

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        ids = torch.randint(0, models.VOCABULARY, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def adapted(**options):
    return veneer.attach(models.llama(), "lora", rank=2, **options)


def arguments(folder: Path, **changed) -> TrainingArguments:
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**given, **changed})


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("optimiser", [None, "loraplus", "lorapro"])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path, optimiser, init):
    kind = adapter_trainer(Trainer, optimiser)
    whole = kind(model=adapted(init=init), args=arguments(tmp_path / "whole"), train_dataset=Ids())
    whole.train()
    again = kind(model=adapted(init=init), args=arguments(tmp_path / "again"), train_dataset=Ids())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (_, a), (_, b) in zip(changes(whole.model, "default"), changes(again.model, "default"), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert losses(again) == losses(whole)


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(tmp_path):
    base = copy.deepcopy(models.llama())
    trainer = adapter_trainer(Trainer)(model=adapted(), args=arguments(tmp_path), train_dataset=Ids())
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert not list(folder.glob("model*.safetensors")) and not list(folder.glob("pytorch_model*"))
    with safe_open(folder / STATE, "pt") as f:
        assert all(".deltas." in name for name in f.keys())
    for name, p in base_parameters(trainer.model).items():
        assert torch.equal(p, base.get_parameter(name))
    ids = Ids()[0]["input_ids"][None]
    opened = veneer.load(models.llama(), folder)
    torch.testing.assert_close(opened(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_losses_are_those_of_a_plain_loop(tmp_path):
    args = arguments(
        tmp_path, max_steps=6, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no"
    )
    trainer = adapter_trainer(Trainer, "loraplus", ratio=4)(model=adapted(), args=args, train_dataset=Ids())
    seen = []
    inner = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: seen.append(inputs) or inner(model, inputs, *rest)
    trainer.train()
    model = adapted().train()
    optimiser = build(model, "loraplus", args, ratio=4)
    for batch, expected in zip(seen, losses(trainer), strict=True):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_decay_follows_the_rate_of_each_step():
    model = adapted()
    args = arguments(Path("unused"), learning_rate=0.5, weight_decay=0.1)
    optimiser = build(model, "loraplus", args, ratio=4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
    (_, delta), *_ = changes(model, "default")
    with torch.no_grad():
        delta.B.fill_(1.0)
    for step in range(2):
        A, B = delta.A.detach().clone(), delta.B.detach().clone()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimiser.step()
        kept = math.sqrt(1 - 0.5 / (1 + step) * 0.1)
        torch.testing.assert_close(delta.A.detach(), kept * A)
        torch.testing.assert_close(delta.B.detach(), kept * B)
        schedule.step()


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no adapter is attached"):
        adapter_trainer(Trainer)(model=models.llama(), args=arguments(tmp_path), train_dataset=Ids())
    with pytest.raises(ConfigError, match="did you mean 'loraplus'"):
        adapter_trainer(Trainer, "lorapls")
    trainer = adapter_trainer(Trainer)(
        model=adapted(), args=arguments(tmp_path, max_steps=3), train_dataset=Ids()
    )
    trainer.train()
    other = veneer.attach(models.llama(), "lora", rank=3)
    with pytest.raises(FormatError, match="tensors differ from the model's"):
        adapter_trainer(Trainer)(model=other, args=arguments(tmp_path), train_dataset=Ids()).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )
    (tmp_path / "checkpoint-3" / STATE).unlink()
    with pytest.raises(FormatError, match=f"{STATE} is missing"):
        adapter_trainer(Trainer)(model=adapted(), args=arguments(tmp_path), train_dataset=Ids()).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


def test_the_best_checkpoint_comes_back(tmp_path):
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        learning_rate=0.01,
        save_total_limit=2,
    )
    trainer = adapter_trainer(Trainer)(model=adapted(), args=args, train_dataset=Ids(), eval_dataset=Ids())
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    with safe_open(Path(best) / STATE, "pt") as f:
        for name, t in trainer.model.state_dict().items():
            assert ".deltas." not in name or torch.equal(t, f.get_tensor(name))


# -- the reference ---------------------------------------------------------------------------------


def test_a_reference_is_the_base_and_shares_its_memory():
    model, ids = adapted(), Ids()[0]["input_ids"][None]
    before = models.llama().eval()(ids).logits
    with torch.no_grad():
        for _, delta in changes(model, "default"):
            delta.B.add_(0.1)
    view = reference(model.eval())
    assert torch.equal(view(ids).logits, before) and not torch.equal(model(ids).logits, before)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in view.parameters()} <= own
    with pytest.raises(ConfigError, match="no backbone"):
        reference(torch.nn.Linear(2, 2))


def test_a_reference_puts_adapters_back_after_an_error():
    model = adapted()
    with pytest.raises(IndexError):
        reference(model)(torch.tensor([[10_000]]))
    assert veneer.adapt.attached.active(model) == {"default": 1.0}


# -- TRL -------------------------------------------------------------------------------------------


def chat(**columns):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([columns] * 8)


def common(folder: Path, **changed):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **changed,
    }


def language_model():
    return veneer.attach(models.llama(vocab_size=len(tiny.tokenizer())), "lora", rank=2)


def test_sft_trains_and_saves_the_adapter_alone(tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(**common(tmp_path, max_length=32))
    rows = chat(text="the cat sat on the mat")
    trainer = adapter_trainer(trl.SFTTrainer)(
        model=language_model(), args=args, train_dataset=rows, processing_class=tiny.tokenizer()
    )
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0]
    assert (tmp_path / "checkpoint-2" / STATE).is_file()
    assert not list((tmp_path / "checkpoint-2").glob("model*"))


def test_dpo_starts_at_the_reference_and_moves_away(tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(**common(tmp_path, max_length=32, beta=0.1))
    model = language_model()
    trainer = adapter_trainer(trl.DPOTrainer)(
        model=model,
        ref_model=reference(model),
        args=args,
        train_dataset=chat(prompt="the cat", chosen=" sat", rejected=" ran"),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(2), abs=1e-4) and found[1] < found[0] - 1e-3


def test_an_adapter_on_a_head_that_trl_reads_is_refused(tmp_path):
    trl = pytest.importorskip("trl")
    model = veneer.attach(models.llama(vocab_size=len(tiny.tokenizer())), "lora", rank=2, to=["lm_head"])
    with pytest.raises(ConfigError, match="lm_head: TRL reads the head's weight directly"):
        adapter_trainer(trl.SFTTrainer)(
            model=model,
            args=trl.SFTConfig(**common(tmp_path)),
            train_dataset=chat(text="a"),
            processing_class=tiny.tokenizer(),
        )
