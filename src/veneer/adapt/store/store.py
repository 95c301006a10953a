"""Save and load adapters: PEFT's folder wherever PEFT can express them, with a manifest that says what must be true.

On disk an adapter is relative to the untouched base, so that any saved adapter goes with any other. Nothing is attached
before everything has been checked, and everything that is wrong is said at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer import files
from veneer.adapt import attach, attached
from veneer.adapt import probe as golden
from veneer.adapt.attached import Changes
from veneer.adapt.peft import prefixes, reading, settings, targets, writing
from veneer.adapt.peft.targets import Config
from veneer.adapt.problems import Problem, check_allowed, clash, dead, hollow, not_finite, refuse, resized
from veneer.adapt.sizes import size
from veneer.adapt.store import fingerprint, manifest, native, rounding
from veneer.errors import ConfigError, FormatError, first_few
from veneer.methods.prefix import Prefix


def save(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    probe: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    allow: str | Iterable[str] = (),
) -> Path:
    """Writes adapter `name` into `folder`, whole or not at all, and returns the folder.

    probe: keyword arguments of one call of the model, whose outputs are kept and compared when the adapter is loaded;
    language models and token classifiers need none. dtype: of the tensors, where float32 is too large. allow: "zero",
    "finite". Raises FormatError, before anything is written, for layers whose change is zero, empty or not finite, and for a
    dtype that would lose more than a twentieth of a change.
    """
    attach.refuse_compiled(model)
    folder, allowed = Path(folder), check_allowed(allow)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; an adapter is saved in a folder")
    changes = attached.changes(model, name)
    refuse(f"adapter {name!r} was not saved", hollow(changes))
    written = (prefixes if prefixes.is_prefix(changes) else writing).write(model, changes)
    on_disk = changes if dtype is None else rounding.as_saved(changes, dtype, written is not None)
    sizes = {site.name: size(site, delta) for site, delta in on_disk}
    state = {f"{site.name}.{k}": t for site, delta in on_disk for k, t in delta.state_dict().items()}
    problems = dead(on_disk, sizes) + not_finite(state) + ([] if written else native.homeless(changes))
    used = refuse(f"adapter {name!r} was not saved", problems, allowed)
    kept = golden.take(model, name, probe, dtype)
    settings = {n: targets.at(written.config, n) for n in sizes} if written else None
    content = {
        **manifest.describe(changes, sizes, written.own if written else {}, settings),
        "base": fingerprint.measure(model),
        "probe": kept if isinstance(kept, dict) else None,
        "no_probe": None if isinstance(kept, dict) else kept,
        "allow": sorted(used.union(*(_let_through(delta) for _, delta in changes))),
    }
    tensors = {n: rounding.rounded(t, dtype) for n, t in (written.tensors if written else state).items()}
    _write(
        folder,
        {**tensors, **(written.whole if written else {})},
        written.config if written else None,
        content,
    )
    return folder


def _write(folder: Path, tensors: dict[str, Tensor], config: Config | None, content: dict[str, Any]) -> None:
    """All files under temporary names first; the manifest, which vouches for the tensors, takes its place last."""
    target = folder / (native.TENSORS if config is None else settings.TENSORS)
    paths = [target, *([] if config is None else [folder / settings.CONFIG]), folder / manifest.NAME]
    with files.replacing(*paths) as temporary:
        files.write_tensors(temporary[0], tensors)
        content["tensors"] = {
            "file": target.name,
            "sha256": files.sha256(temporary[0]),
            "bytes": temporary[0].stat().st_size,
        }
        if config is not None:
            files.write_json(temporary[1], config)
        files.write_json(temporary[-1], content)
    for other in {native.TENSORS, settings.TENSORS, settings.CONFIG} - {p.name for p in paths}:
        (folder / other).unlink(missing_ok=True)  # of an adapter that this one has replaced


def load(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    allow: str | Iterable[str] = (),
    trainable: bool = False,
    initial: str | Path | None = None,
) -> nn.Module:
    """The same model with the adapter in `folder` attached as `name`, acting at strength 1.

    Reads what `save` wrote, and PEFT's folders. trainable: whether it, and it alone, takes gradients. initial:
    PEFT's folder of the adapter before training, for its starts that the base does not determine (pissa_niter, corda,
    lora_ga). allow: words for what to let through, see ALLOW. Raises FormatError that lists everything at once: another
    base, missing, unused or misshapen tensors, a changed file, a change that is zero or not finite, a failed probe, no
    effect on the outputs; the model is then as it was.
    """
    attach.refuse_compiled(model)
    folder, allowed = Path(folder), check_allowed(allow)
    attach.check_name(model, name)
    found = _open(folder)
    changes, problems = _read(model, found, _initial(found, initial))
    sizes = {site.name: size(site, delta) for site, delta in changes}
    record = found.manifest
    other = (
        [Problem("base", text) for text in fingerprint.differences(model, record["base"])] if record else []
    )
    problems = (
        other + found.problems + problems + not_finite(found.tensors) + clash(changes) + dead(changes, sizes)
    )
    if record and not other and set(sizes) <= set(record["sites"]):
        problems += resized(sizes, record["sites"])
    used = refuse(f"{folder} was not loaded", problems, allowed)
    attach.hang(model, name, changes)
    if record is None or (record["probe"] and not other):
        used |= _prove(model, name, record and record["probe"], allowed, folder)
    for _, delta in changes:
        delta.requires_grad_(False)
        vars(delta)["let_through"] = sorted(used)
    if trainable:
        attach.train_only(model, name)
        attach.watch(model)
    return model


class Opened(NamedTuple):
    """A folder's files; manifest None: PEFT's own; config None: our own layout."""

    manifest: dict[str, Any] | None
    config: Config | None
    tensors: dict[str, Tensor]
    problems: list[Problem]


def _open(folder: Path) -> Opened:
    if not folder.is_dir():
        raise FormatError(f"there is no folder {folder}")
    record = manifest.read(folder)
    if record is None and not (folder / settings.CONFIG).is_file():
        inner = sorted(p.parent.name for p in folder.glob(f"*/{settings.CONFIG}"))
        hint = f"; it holds the adapters {first_few(inner)}: name one of these folders" if inner else ""
        raise FormatError(
            f"{folder} is no adapter: it has neither {manifest.NAME} nor {settings.CONFIG}{hint}"
        )
    own = record is not None and record["layout"] == manifest.NATIVE
    path = folder / (native.TENSORS if own else settings.TENSORS)
    config = None if own else files.read_json(folder / settings.CONFIG)
    if config is None or "peft_type" in config:  # other programs' tensors have another name
        files.refuse_pickle(folder, path.name)
    else:
        _refuse_settings(config)
    problems = []
    if record and files.sha256(path) != record["tensors"]["sha256"]:
        text = f"{path.name} is not the file that {manifest.NAME} was written with: it was changed, or a save was cut off"
        problems.append(Problem("sha256", text))
    return Opened(record, config, files.read_tensors(path), problems)


def _initial(found: Opened, initial: str | Path | None) -> dict[str, Tensor] | None:
    """The tensors of the folder saved before training, if any. Raises FormatError for settings that cannot be read."""
    if found.config is not None:
        _refuse_settings(found.config, found.problems, has_initial=initial is not None)
    if initial is None:
        return None
    files.refuse_pickle(Path(initial), settings.TENSORS)
    return files.read_tensors(Path(initial) / settings.TENSORS)


def _refuse_settings(config: Config, others: Iterable[Problem] = (), *, has_initial: bool = False) -> None:
    """Raises FormatError for settings that cannot be read, and then for the other problems too."""
    wrong = [Problem("fit", text) for text in reading.settings_problems(config, has_initial)]
    refuse("the adapter cannot be read", [*wrong, *others] if wrong else [])


def _read(
    model: nn.Module, found: Opened, initial: dict[str, Tensor] | None
) -> tuple[Changes, list[Problem]]:
    record = found.manifest
    if found.config is None:
        assert record is not None
        return native.read(model, record, found.tensors)
    own = {n: entry["own"] for n, entry in record["sites"].items()} if record else {}
    if settings.method_of(found.config) is Prefix:
        changes, problems = prefixes.read(model, found.config, found.tensors)
    else:
        changes, problems = reading.read(model, reading.Source(found.config, found.tensors, own, initial))
    if record is None or problems:
        return changes, problems
    odd = {site.name for site, _ in changes} ^ set(record["sites"])
    if odd:
        return changes, [
            Problem(
                "fit",
                f"{manifest.NAME} and {settings.CONFIG} name different layers: {first_few(sorted(odd))}",
            )
        ]
    for site, delta in changes:
        delta.options = manifest.site_options(record, site.name)
    return changes, []


def _let_through(delta: nn.Module) -> list[str]:
    return list(vars(delta).get("let_through", []))


def _prove(
    model: nn.Module, name: str, kept: dict[str, Any] | None, allowed: set[str], folder: Path
) -> set[str]:
    """The outputs are those that were kept with the adapter; where another program kept none, at least not the base's."""
    try:
        problems = (
            [Problem("probe", text) for text in golden.check(model, name, kept)]
            if kept
            else golden.idle(model, name)
        )
        return refuse(f"{folder} was not loaded", problems, allowed)
    except BaseException:
        attach.detach(model, name)
        raise
