"""Makes accelerate's save_state and load_state hold adapters instead of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from veneer.adapt.attached import adapters
from veneer.integrations.checkpoint import load_checkpoint, save_checkpoint


def adapters_only(accelerator: Any) -> None:
    """Makes the states of an Accelerator hold the adapters of prepared models, and nothing of their bases.

    The state keeps optimisers, schedulers and generators. Models without adapters are saved whole.
    The second and further adapted models lie in folders model_1, model_2, ..

        accelerator = Accelerator()
        adapters_only(accelerator)
    """

    def on_save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        for i in reversed(range(len(models))):
            own = accelerator.unwrap_model(models[i])
            if adapters(own):
                if accelerator.is_main_process:
                    save_checkpoint(own, _place(folder, i))
                weights.pop(i)

    def on_load(models: list[nn.Module], folder: str) -> None:
        for i in reversed(range(len(models))):
            own = accelerator.unwrap_model(models[i])
            if adapters(own):
                load_checkpoint(own, _place(folder, i))
                models.pop(i)

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)


def _place(folder: str, i: int) -> Path:
    return Path(folder, f"model_{i}") if i else Path(folder)
