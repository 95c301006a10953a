"""Makes Lightning's checkpoints hold adapters instead of the whole module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veneer.adapt.attached import adapters
from veneer.errors import ConfigError, FormatError, first_few
from veneer.integrations.checkpoint import state


class AdapterModule:
    """A mixin to put before a LightningModule: `class My(AdapterModule, LightningModule)`.

    Checkpoints hold the adapters of its models and the parameters that are trained, and Lightning's own
    optimiser, loop and callback states. A checkpoint resumes on a module with the same adapters attached.
    """

    strict_loading = False  # the base's tensors are not in a checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves everything but adapters and trained parameters out of the checkpoint."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        own = self._state()
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in own}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises FormatError unless the checkpoint has exactly the tensors of the attached adapters."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        found, own = checkpoint["state_dict"], self._state()
        wrong = sorted(found.keys() ^ own.keys())
        if wrong:
            raise FormatError(
                f"checkpoint: tensors differ from the module's: {first_few(wrong)}; attach the same adapter"
                " first"
            )

    def _state(self) -> dict[str, Tensor]:
        assert isinstance(self, nn.Module)
        if not adapters(self):
            raise ConfigError("module: no adapter is attached; call veneer.attach(model, ..) in __init__")
        return state(self)
