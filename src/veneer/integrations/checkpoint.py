"""Checkpoints of a training loop that is not ours: the adapter in PEFT's layout, and its exact state."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from veneer import files
from veneer.adapt.attached import adapters, deltas_of
from veneer.adapt.store.store import save
from veneer.errors import FormatError, first_few
from veneer.sites.own import is_own

STATE = (
    "veneer_state.safetensors"  # every trained tensor bit for bit; the adapter's own file may round or factor
)


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
