"""Opens an adapter's folder: its manifest, its settings and its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from veneer import files
from veneer.adapt.peft import adapter_names, refusals, settings
from veneer.adapt.peft.targets import Config
from veneer.adapt.store import manifest, native
from veneer.adapt.store.problems import Problem, refuse
from veneer.errors import FormatError, first_few

IN_A_RUN = "adapter"  # the folder of the adapter in that of a run


def adapter_folder(folder: Path) -> Path:
    """Returns the folder of the adapter itself: a run's folder stands for the adapter in it."""
    inner = folder / IN_A_RUN
    return inner if inner.is_dir() and not holds_one(folder) else folder


def holds_one(folder: Path) -> bool:
    """Returns True if files of an adapter are in the folder."""
    return any((folder / name).is_file() for name in (settings.CONFIG, settings.TENSORS, manifest.NAME))


class Opened(NamedTuple):
    """A folder's files. manifest is None for PEFT's own folders, config is None for Veneer's own layout."""

    manifest: dict[str, Any] | None
    config: Config | None
    tensors: dict[str, Tensor]
    problems: list[Problem]


def open_folder(folder: Path) -> Opened:
    """Opens the folder. Raises FormatError if it holds no adapter, or one that must be converted first."""
    if not folder.is_dir():
        raise FormatError(f"{folder}: the folder does not exist; check the path")
    record = manifest.record_of(folder)
    if record is None and not (folder / settings.CONFIG).is_file():
        inner = sorted(p.parent.name for p in folder.glob(f"*/{settings.CONFIG}"))
        hint = f"; it holds the adapters {first_few(inner)}: name one of these folders" if inner else ""
        raise FormatError(
            f"{folder} holds no adapter: it has neither {manifest.NAME} nor {settings.CONFIG}{hint}"
        )
    own = record is not None and record["layout"] == manifest.NATIVE
    path = folder / (native.TENSORS if own else settings.TENSORS)
    config = None if own else files.read_json(folder / settings.CONFIG)
    if config is None or "peft_type" in config:  # other programs' tensors have another name
        files.refuse_pickle(folder, path.name)
    else:
        refuse_settings(config, [], has_initial=False)
    problems = []
    if record and files.sha256(path) != record["tensors"]["sha256"]:
        text = (
            f"{path.name} differs from the file that {manifest.NAME} describes: it was changed, or a save "
            "was cut off"
        )
        problems.append(Problem("sha256", text))
    tensors = files.read_tensors(path)
    return Opened(record, config, tensors if own else adapter_names.without(tensors), problems)


def open_initial(found: Opened, initial: str | Path | None) -> dict[str, Tensor] | None:
    """Returns the tensors of the folder saved before training, or None without one.

    Raises FormatError for settings of `found` that cannot be read with or without it.
    """
    if found.config is not None:
        refuse_settings(found.config, found.problems, has_initial=initial is not None)
    if initial is None:
        return None
    files.refuse_pickle(Path(initial), settings.TENSORS)
    return files.read_tensors(Path(initial) / settings.TENSORS)


def refuse_settings(config: Config, others: Iterable[Problem], *, has_initial: bool) -> None:
    """Raises FormatError for settings that cannot be read, listing the other problems with them."""
    wrong = [Problem("fit", text) for text in refusals.settings_problems(config, has_initial)]
    refuse("the adapter cannot be read", [*wrong, *others] if wrong else [])
