"""Makes transformers' Trainer, and TRL's trainers, save and resume the adapter instead of the whole model.

A Trainer takes every `PreTrainedModel` for a fully fine-tuned one: its checkpoints would hold the base beside
adapter tensors under names that `from_pretrained` ignores, so that a checkpoint opens as the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import files, optim
from veneer.adapt.attached import adapters, deltas_of
from veneer.adapt.store.store import save
from veneer.errors import ConfigError, FormatError, first_few
from veneer.integrations.heads import check_head
from veneer.optim.base import groups
from veneer.sites.own import is_own

STATE = (
    "veneer_state.safetensors"  # every trained tensor bit for bit; the adapter's own file may round or factor
)


class AdapterTrainer:
    """A mixin to put before a Trainer, as `adapter_trainer` does: `class My(AdapterTrainer, SFTTrainer)`.

    A checkpoint holds the adapter in PEFT's layout, its exact state, and the Trainer's optimiser, scheduler
    and generators. optimiser: the name of one of Veneer's optimisers, or None for the one in the arguments.
    """

    optimiser: str | None = None
    optimiser_options: Mapping[str, Any] = {}
    model: Any
    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if not isinstance(model, nn.Module) or not adapters(model):
            raise ConfigError(
                "model: no adapter is attached; call veneer.attach(model, ..) before the trainer"
            )
        if "trl" in {kind.__module__.partition(".")[0] for kind in type(self).__mro__}:
            check_head(model)
        super().__init__(*args, **kwargs)
        if getattr(self, "is_fsdp_enabled", False) or getattr(self, "is_deepspeed_enabled", False):
            raise ConfigError(
                "args: FSDP and DeepSpeed are unsupported here; train on one device, or with DDP"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns Veneer's optimiser by roles, or the Trainer's own without a name."""
        if self.optimiser is None:
            return super().create_optimizer(model)  # type: ignore[misc, no-any-return]
        if getattr(self, "optimizer", None) is None:
            self.optimizer = build(self.model, self.optimiser, self.args, **self.optimiser_options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes every adapter and the exact state; nothing of the base."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_checkpoint(self.model, folder)
        if (processing := getattr(self, "processing_class", None)) is not None:
            processing.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_checkpoint(model or self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_checkpoint(self.model, Path(self.state.best_model_checkpoint))  # type: ignore[attr-defined]


def adapter_trainer(kind: type, optimiser: str | None = None, **options: Any) -> type:
    """Returns the trainer class `kind` with checkpoints that hold adapters only.

    optimiser: a name that `veneer methods` lists, such as "loraplus"; options: its own.
    Raises ConfigError for unknown ones.

        trainer = adapter_trainer(SFTTrainer, "loraplus", ratio=8)(model=model, args=args, train_dataset=rows)
    """
    if optimiser is not None:
        optim.make(optimiser, **options)
    own = {"optimiser": optimiser, "optimiser_options": options, "__doc__": kind.__doc__}
    return type(f"Adapter{kind.__name__}", (AdapterTrainer, kind), own)


def build(model: nn.Module, name: str, args: Any, **options: Any) -> torch.optim.Optimizer:
    """Returns the optimiser `name` for the trained adapters, with the arguments' rate, betas and decay.

    Schedulers multiply the rate of each group; the decay that belongs to the rate is set before every step.
    """
    made = optim.make(name, **options)
    parts = [p for adapter in trained(model) for p in groups.of_adapter(model, adapter)]
    optimiser = made.build(optim.Trained(parts, betas=(args.adam_beta1, args.adam_beta2)))
    groups.set_rates(optimiser, args.learning_rate, args.weight_decay)

    def follow(used: torch.optim.Optimizer, *event: Any) -> None:
        first = used.param_groups[0]
        groups.set_rates(used, first["lr"] / first["scale"], args.weight_decay)

    optimiser.register_step_pre_hook(follow)
    return optimiser


def trained(model: nn.Module) -> list[str]:
    """Returns the names of the adapters that take gradients, in the order of their attaching."""
    found = {
        name
        for layer in model.modules()
        if (deltas := deltas_of(layer)) is not None
        for name in deltas.names()
        if any(p.requires_grad for p in deltas[name].parameters())
    }
    return [name for name in adapters(model) if name in found]


def state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors that training may change: adapters with buffers, and trained parameters."""
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    return {n: t for n, t in model.state_dict().items() if is_own(n) or n in learned}


def save_checkpoint(model: nn.Module, folder: Path) -> None:
    """Writes the trained adapter into `folder`, several into folders of their names, and the exact state."""
    names = trained(model) or adapters(model)
    for name in names:
        save(model, folder if len(names) == 1 else folder / name, name, allow="zero")
    tensors = {n: t.detach().contiguous().cpu() for n, t in state(model).items()}
    with files.replacing(folder / STATE) as (temporary,):
        files.write_tensors(temporary, tensors)


def load_checkpoint(model: nn.Module, folder: Path) -> None:
    """Loads the exact state of a checkpoint. Raises FormatError if its tensors differ from the model's."""
    path = folder / STATE
    if not path.is_file():
        raise FormatError(f"{folder}: {STATE} is missing; resume from a checkpoint of an adapter trainer")
    found, own = files.read_tensors(path), state(model)
    wrong = sorted(found.keys() ^ own.keys()) + [
        n for n in found.keys() & own.keys() if found[n].shape != own[n].shape
    ]
    if wrong:
        raise FormatError(
            f"{path}: tensors differ from the model's: {first_few(wrong)}; attach the same adapter first"
        )
    with torch.no_grad():
        for name, t in own.items():
            t.copy_(found[name])
