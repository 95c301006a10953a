"""Loops of accelerate and Lightning, and plain ones: states that hold adapters, resuming, kills."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors import safe_open
from support import models, tiny

import veneer
from veneer.adapt.attached import changes
from veneer.errors import ConfigError, FormatError
from veneer.integrations.accelerated import adapters_only
from veneer.integrations.checkpoint import STATE, load_checkpoint, save_checkpoint
from veneer.integrations.lightning import AdapterModule
from veneer.integrations.optimisers import build_optimiser

STEPS = 6


def batch(i):
    return torch.randint(0, models.VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(i))


def adapted(rank=2):
    return veneer.attach(models.llama(), "lora", rank=rank)


def same(a, b):
    for (_, x), (_, y) in zip(changes(a, "default"), changes(b, "default"), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x.parameters(), y.parameters(), strict=True))


def step(model, optimiser, i, backward=lambda loss: loss.backward()):
    ids = batch(i)
    backward(model(input_ids=ids, labels=ids).loss)
    optimiser.step()
    optimiser.zero_grad()


def whole(name):
    model = adapted()
    optimiser = build_optimiser(model, name, lr=0.01, weight_decay=0.1)
    for i in range(STEPS):
        step(model, optimiser, i)
    return model


@pytest.mark.parametrize("name", ["adamw", "loraplus", "lorapro"])
def test_a_plain_loop_resumes_bit_for_bit(tmp_path, name):
    model = adapted()
    optimiser = build_optimiser(model, name, lr=0.01, weight_decay=0.1)
    for i in range(3):
        step(model, optimiser, i)
    save_checkpoint(model, tmp_path)
    torch.save(optimiser.state_dict(), tmp_path / "optimiser.pt")
    again = adapted()
    load_checkpoint(again, tmp_path)
    optimiser = build_optimiser(again, name, lr=0.01, weight_decay=0.1)
    optimiser.load_state_dict(torch.load(tmp_path / "optimiser.pt"))
    for i in range(3, STEPS):
        step(again, optimiser, i)
    same(again, whole(name))


@pytest.mark.parametrize("name", ["loraplus", "lorapro"])
def test_accelerates_states_hold_adapters_and_resume(tmp_path, name):
    accelerate = pytest.importorskip("accelerate")

    def begun():
        accelerator = accelerate.Accelerator(cpu=True)
        adapters_only(accelerator)
        model = adapted()
        return accelerator, *accelerator.prepare(
            model, build_optimiser(model, name, lr=0.01, weight_decay=0.1)
        )

    accelerator, model, optimiser = begun()
    for i in range(3):
        step(model, optimiser, i, accelerator.backward)
    accelerator.save_state(str(tmp_path))
    assert not list(tmp_path.glob("model*")) and (tmp_path / "adapter_model.safetensors").is_file()
    with safe_open(tmp_path / STATE, "pt") as f:
        assert all(".deltas." in n for n in f.keys())
    accelerator, again, optimiser = begun()
    accelerator.load_state(str(tmp_path))
    for i in range(3, STEPS):
        step(again, optimiser, i, accelerator.backward)
    same(accelerator.unwrap_model(again), whole(name))


# -- Lightning -------------------------------------------------------------------------------------


def module(rank=2, attached=True):
    lightning = pytest.importorskip("pytorch_lightning")

    class Adapted(AdapterModule, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = adapted(rank) if attached else models.llama()
            self.model.train()

        def training_step(self, ids, i):
            ids = batch(self.global_step)  # Lightning begins a plain loader anew in the middle of an epoch
            return self.model(input_ids=ids, labels=ids).loss

        def configure_optimizers(self):
            return build_optimiser(self.model, "loraplus", lr=0.01, weight_decay=0.1)

    return Adapted()


def lightning_fit(own, folder, steps=STEPS, ckpt_path=None):
    lightning = pytest.importorskip("pytorch_lightning")
    keeping = lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        callbacks=[keeping],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = torch.utils.data.DataLoader([batch(i) for i in range(STEPS)], batch_size=None)
    trainer.fit(own, rows, ckpt_path=ckpt_path)
    return own


def test_lightnings_checkpoints_hold_adapters_and_resume(tmp_path):
    straight = lightning_fit(module(), tmp_path / "a")
    middle = next(path for path in (tmp_path / "a").glob("*.ckpt") if "step=3" in path.name)
    saved = torch.load(middle, weights_only=False)
    assert saved["state_dict"] and all(".deltas." in name for name in saved["state_dict"])
    same(straight.model, whole("loraplus"))
    same(lightning_fit(module(), tmp_path / "b", ckpt_path=str(middle)).model, straight.model)
    with pytest.raises(ConfigError, match="module: no adapter is attached"):
        module(attached=False)._state()
    other = module()
    veneer.attach(other.model, "lora", name="second", rank=2)
    with pytest.raises(FormatError, match="tensors differ from the module's"):
        lightning_fit(other, tmp_path / "c", ckpt_path=str(middle))


# -- a kill ----------------------------------------------------------------------------------------


def die(make, folder, at, threads):
    """Trains in a process of its own, which is killed in the step after the first `at`."""
    torch.set_num_threads(threads)
    trainer = make(folder)
    inner = trainer.training_step

    def step(*given):
        if trainer.state.global_step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*given)

    trainer.training_step = step
    trainer.train()


def killed(make, folder, at):
    process = tiny._forks().Process(target=die, args=(make, folder, at, torch.get_num_threads()))
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def plain(folder):
    """The Trainer of transformers with our checkpoints and optimiser."""
    from test_trainer import Ids, Trainer, adapter_trainer, arguments

    kind = adapter_trainer(Trainer, "loraplus")
    return kind(model=adapted(), args=arguments(folder), train_dataset=Ids())


def test_a_killed_trainer_resumes_from_its_checkpoint(tmp_path):
    from test_trainer import losses

    assert killed(plain, tmp_path / "run", 4) and (tmp_path / "run" / "checkpoint-3" / STATE).is_file()
    again, straight = plain(tmp_path / "run"), plain(tmp_path / "whole")
    again.train(resume_from_checkpoint=True)
    straight.train()
    same(again.model, straight.model)
    assert losses(again) == losses(straight)


def sft(folder):
    """TRL's SFTTrainer with our checkpoints and optimiser, on rows of prompts and completions."""
    import trl
    from test_trl import ROWS, common, trainer_of

    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]
    args = trl.SFTConfig(**common(folder, max_length=32, max_steps=5))
    return trainer_of(trl.SFTTrainer, args, rows, "loraplus")


def test_a_killed_sft_trainer_resumes_from_its_checkpoint(tmp_path):
    pytest.importorskip("trl")
    assert killed(sft, tmp_path / "run", 3)
    folder = tmp_path / "run" / "checkpoint-2"
    assert (folder / STATE).is_file() and not list(folder.glob("model*"))
    again, straight = sft(tmp_path / "run"), sft(tmp_path / "whole")
    again.train(resume_from_checkpoint=True)
    straight.train()
    same(again.model, straight.model)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (again, straight)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
