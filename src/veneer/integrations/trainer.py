"""Makes transformers' Trainer, and TRL's trainers, save and resume the adapter instead of the whole model.

A Trainer takes every `PreTrainedModel` for a fully fine-tuned one: its checkpoints would hold the base beside
adapter tensors under names that `from_pretrained` ignores, so that a checkpoint opens as the base.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import optim
from veneer.adapt.attached import adapters
from veneer.errors import ConfigError
from veneer.integrations.checkpoint import STATE, load_checkpoint, save_checkpoint
from veneer.integrations.heads import check_head
from veneer.integrations.optimisers import build_optimiser
from veneer.integrations.reference import reference

__all__ = ["STATE", "AdapterTrainer", "adapter_trainer", "build"]


class AdapterTrainer:
    """A mixin to put before a Trainer, as `adapter_trainer` does: `class My(AdapterTrainer, SFTTrainer)`.

    A checkpoint holds the adapter in PEFT's layout, its exact state, and the Trainer's optimiser, scheduler
    and generators. The reference of TRL's trainers is the model with its adapters off, unless ref_model
    names another. optimiser: the name of one of Veneer's optimisers, or None for the one in the arguments.
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
            self._with_reference(model, args, kwargs)
        else:
            super().__init__(*args, **kwargs)
        if getattr(self, "is_fsdp_enabled", False) or getattr(self, "is_deepspeed_enabled", False):
            raise ConfigError(
                "args: FSDP and DeepSpeed are unsupported here; train on one device, or with DDP"
            )

    def _with_reference(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a trainer of TRL whose reference, where it has one, is the model with its adapters off."""
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        settings: Any = given.arguments.get("args")
        if getattr(settings, "use_vllm", False):
            raise ConfigError("args: use_vllm would send vLLM the base without its adapters; leave it out")
        if "ref_model" in given.signature.parameters:
            if given.arguments.get("ref_model") is None:
                given.arguments["ref_model"] = reference(model)
            super().__init__(*given.args, **given.kwargs)
            return
        # GRPO and RLOO take no reference: a beta of 0 keeps them from loading a second model.
        beta = getattr(settings, "beta", 0.0) if hasattr(settings, "num_generations") else 0.0
        if not beta:
            super().__init__(*args, **kwargs)
            return
        settings.beta = 0.0
        try:
            super().__init__(*args, **kwargs)
        finally:
            settings.beta = beta
        self._add_reference(beta)

    def _add_reference(self, beta: float) -> None:
        from trl.trainer.utils import add_fused_lm_head

        self.beta, self.ref_model = beta, reference(self.model)
        add_fused_lm_head(
            self.ref_model,
            temperature=self.temperature,  # type: ignore[attr-defined]
            cast_lm_head_to_fp32=getattr(self.args, "cast_lm_head_to_fp32", False),
        )
        prepare = self.accelerator.prepare_model  # type: ignore[attr-defined]
        self.ref_model = prepare(self.ref_model, evaluation_mode=True)

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
    """Returns the optimiser `name` for the trained adapters, with the arguments' rate, betas and decay."""
    betas = (args.adam_beta1, args.adam_beta2)
    decay = args.weight_decay
    return build_optimiser(model, name, lr=args.learning_rate, weight_decay=decay, betas=betas, **options)
