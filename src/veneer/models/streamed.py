"""A model on the disk whose blocks are read one at a time: compression in the memory of one block."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from veneer import foreign
from veneer.compress.lowrank.sources import Source
from veneer.errors import FormatError, first_few
from veneer.models.compressed import hollow_model
from veneer.sites.finding.names import Target

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Streamed(Source):
    """The causal language model in a Hugging Face folder; what lies outside the blocks is in memory, in
    float32.

    Raises FormatError for a folder whose files name weights otherwise than the model does, or lack some: such
    a model has to be loaded whole.
    """

    def __init__(self, folder: Path, to: Target, exclude: Target, device: torch.device | str = "cpu") -> None:
        from transformers import AutoConfig

        self.folder, self.device = folder, torch.device(device)
        self.files = files_of(folder)
        self.config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = hollow_model(self.config).eval().requires_grad_(False)
        for name, buffer in list(model.named_buffers()):
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._buffers[last] = buffer.to(self.device)
        wanted = names_of(model)
        missing = [n for n in wanted if n not in self.files]
        if missing:
            raise FormatError(
                f"{folder}: {len(missing)} weights are missing in its files: {first_few(missing)}"
            )
        super().__init__(model, to, exclude)
        inside = tuple(f"{name}." for name in self.walk.names)
        outside = [n for n in wanted if not n.startswith(inside)]
        model.load_state_dict(self.read(outside), strict=False, assign=True)
        model.tie_weights()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the blocks' weights in the files."""
        first = f"{self.walk.names[0]}.{self.names[0][0]}.weight"
        return self.stored([first])[first].dtype

    @contextmanager
    def block(self, i: int) -> Iterator[nn.Module]:
        """Yields a copy of block i with its weights in float32, which is forgotten afterwards."""
        name = self.walk.names[i]
        made = copy.deepcopy(self.walk.blocks[i])
        made.__dict__.pop("forward", None)
        own = list(made.state_dict())
        tensors = self.read([f"{name}.{n}" for n in own])
        made.load_state_dict({n: tensors[f"{name}.{n}"] for n in own}, assign=True)
        yield made.requires_grad_(False).eval()

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Returns weights of the files by name, in float32."""
        found = {n: t.to(self.device) for n, t in self.stored(names).items()}
        return {n: t.float() if t.is_floating_point() else t for n, t in found.items()}

    def stored(self, names: list[str]) -> dict[str, Tensor]:
        """Returns weights of the files by name, in their own dtype."""
        found: dict[str, Tensor] = {}
        for file in sorted({self.files[n] for n in names}):
            with safe_open(self.folder / file, "pt") as f:
                found |= {n: f.get_tensor(n) for n in names if self.files[n] == file}
        return found


def files_of(folder: Path) -> dict[str, str]:
    """Returns the file that holds each weight, by the weight's name."""
    if (folder / INDEX).is_file():
        named: dict[str, str] = foreign.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return named
    if not (folder / WEIGHTS).is_file():
        raise FormatError(f"{folder}: {WEIGHTS} is missing")
    try:
        with safe_open(folder / WEIGHTS, "pt") as f:
            return dict.fromkeys(f.keys(), WEIGHTS)
    except SafetensorError as e:
        raise FormatError(f"{folder / WEIGHTS} is damaged ({e}); download it again") from None


def names_of(model: nn.Module) -> list[str]:
    """Names of the state dict, each shared tensor under its first name alone."""
    seen: set[int] = set()
    found = []
    for name, t in model.state_dict(keep_vars=True).items():
        if id(t) not in seen:
            seen.add(id(t))
            found.append(name)
    return found
