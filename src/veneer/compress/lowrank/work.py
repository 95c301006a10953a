"""The folder of a compression under way: what is finished in it is not computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer import files
from veneer.errors import ConfigError

SETTINGS = "work.json"


class Work:
    """Tensors and records under names, each whole or missing. Raises ConfigError for the folder of other
    settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """
        device: where `get` puts tensors
        """
        self.folder, self.device = folder, device
        path = folder / SETTINGS
        if path.is_file():
            before = files.read_json(path)
            changed = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
            if changed:
                raise ConfigError(
                    f"{folder} holds the work of other settings ({', '.join(changed)}); remove it to begin"
                    f" anew, or give the settings it was begun with"
                )
            return
        with files.replacing(path) as (temporary,):
            files.write_json(temporary, settings)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Returns True if tensors of that name are finished."""
        return self.path(name).is_file()

    def put(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> None:
        """Keeps tensors with a record, which is written before them."""
        if record is not None:
            with files.replacing(self.folder / f"{name}.json") as (temporary,):
                files.write_json(temporary, record)
        with files.replacing(self.path(name)) as (temporary,):
            files.write_tensors(temporary, tensors)

    def get(self, name: str) -> dict[str, Tensor]:
        return {n: t.to(self.device) for n, t in files.read_tensors(self.path(name)).items()}

    def record(self, name: str) -> dict[str, Any]:
        return files.read_json(self.folder / f"{name}.json")

    def put_list(self, name: str, tensors: Sequence[Tensor]) -> None:
        self.put(name, {f"{i:05}": t for i, t in enumerate(tensors)})

    def get_list(self, name: str) -> list[Tensor]:
        return [t for _, t in sorted(self.get(name).items())]

    def drop(self, name: str) -> None:
        """Forgets tensors that are needed no longer."""
        self.path(name).unlink(missing_ok=True)
