"""Saves, reads and loads adapters: PEFT's folder where PEFT can express them, with a manifest of what must
hold.

On disk an adapter is relative to the untouched base, so that any saved adapter goes with any other. Nothing
is attached before everything has been checked, and all problems are listed at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import files
from veneer.adapt import attached, calls, hooks, switch
from veneer.adapt import probe as golden
from veneer.adapt.attached import Changes
from veneer.adapt.peft import prefixes, reading, settings, targets, writing
from veneer.adapt.peft.targets import Config
from veneer.adapt.store import fingerprint, manifest, native, rounding
from veneer.adapt.store.beside import within, written_with
from veneer.adapt.store.effect import refuse_effect
from veneer.adapt.store.folder import Opened, adapter_folder, open_folder, open_initial
from veneer.adapt.store.loaded import Loaded, check_fresh
from veneer.adapt.store.problems import (
    Problem,
    check_allowed,
    clash,
    dead,
    hollow,
    not_finite,
    refuse,
    resized,
)
from veneer.adapt.store.sizes import size
from veneer.adapt.tokens import alone
from veneer.adapt.tokens.known import missing
from veneer.errors import ConfigError, first_few
from veneer.methods.prefix import Prefix


def save(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    probe: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    allow: str | Iterable[str] = (),
) -> Path:
    """Writes an adapter into `folder`, whole or not at all, and returns the folder.

    name: the adapter; the only attached one, or "default", unless given. probe: keyword arguments of one call
    of the model, whose outputs are compared on loading; language models and token classifiers have a default.
    dtype: of the tensors, float32 unless given. allow: "zero", "finite". Raises FormatError, before anything
    is written, for changes that are zero, empty or not finite, and for a dtype that would lose more than a
    twentieth of a change.

    >>> veneer.save(model, "out/french", "french")
    """
    folder, allowed = _folder_for(model, folder), check_allowed(allow)
    name = only(model) if name is None else name
    changes = attached.changes(model, name)
    refuse(f"adapter {name!r} was not saved", hollow(changes))
    written, replaced, lost = written_with(model, name, changes)
    on_disk = changes if dtype is None else rounding.as_saved(changes, dtype, written is not None)
    sizes = {site.name: size(site, delta) for site, delta in on_disk}
    state = {f"{site.name}.{k}": t for site, delta in on_disk for k, t in delta.state_dict().items()}
    problems = dead(on_disk, sizes) + not_finite(state) + lost
    problems += [] if written else native.homeless(changes)
    used = refuse(f"adapter {name!r} was not saved", problems, allowed)
    kept = golden.take(model, name, probe, dtype, replaced)
    by_site = {n: targets.at(written.config, n) for n in sizes} if written else None
    content = {
        **manifest.describe(changes, sizes, written.own if written else {}, by_site),
        "base": fingerprint.without(fingerprint.measure(model), replaced),
        "probe": kept if isinstance(kept, dict) else None,
        "no_probe": None if isinstance(kept, dict) else kept,
        "allow": sorted(used.union(*(_let_through(delta) for _, delta in changes))),
    }
    _write(folder, *_in_files(written, state, dtype), content)
    return folder


def _in_files(
    written: writing.Written | None, state: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], Config | None]:
    """Returns the tensors to write, rounded to dtype, and PEFT's settings where its layout is used."""
    tensors = {n: rounding.rounded(t, dtype) for n, t in (written.tensors if written else state).items()}
    return ({**tensors, **written.whole}, written.config) if written else (tensors, None)


def only(model: nn.Module) -> str:
    """Returns "default" if an adapter has that name, or the only attached adapter. Raises ConfigError."""
    names = attached.adapters(model)
    if len(names) == 1 or "default" in names:
        return "default" if "default" in names else names[0]
    if not names:
        raise ConfigError("save: the model has no adapter; attach one first")
    raise ConfigError(f"save: the model has several adapters, name one of them: {first_few(names)}")


def _folder_for(model: nn.Module, folder: str | Path) -> Path:
    hooks.refuse_compiled(model)
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ConfigError(f"{folder} is a file; an adapter is saved in a folder")
    return Path(folder)


def _write(folder: Path, tensors: dict[str, Tensor], config: Config | None, content: dict[str, Any]) -> None:
    """Writes all files under temporary names; the manifest, which vouches for the rest, is renamed last."""
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


def read(
    model: nn.Module,
    folder: str | Path,
    *,
    allow: str | Iterable[str] = (),
    initial: str | Path | None = None,
) -> Loaded:
    """Returns the adapter in `folder` as deltas for this model, which is not touched; `load` and `attach`
    take it.

    Reads what `save` wrote and PEFT's folders. allow: words for problems to let through, see ALLOW. initial:
    PEFT's folder of the adapter before training, for its starts that the base does not determine
    (pissa_niter, corda, lora_ga). Raises FormatError listing every problem at once: another base; missing,
    unused or misshapen tensors; a changed file; a change that is zero or not finite.

    >>> found = veneer.read(model, "out/german")
    >>> veneer.load(model, found, "german")
    """
    hooks.refuse_compiled(model)
    folder, allowed = adapter_folder(Path(folder)), check_allowed(allow)
    found = open_folder(folder)
    short = [Problem("fit", text) for text in missing(model, found.manifest)]
    refuse(f"{folder} was not loaded", short, allowed)
    deltas, problems = _deltas(model, found, open_initial(found, initial))
    sizes = {site.name: size(site, delta) for site, delta in deltas}
    record = found.manifest
    other = (
        [Problem("base", text) for text in fingerprint.differences(model, record["base"])] if record else []
    )
    problems = (
        other + found.problems + problems + not_finite(found.tensors) + clash(deltas) + dead(deltas, sizes)
    )
    if record and not other:
        replaced = record["base"].get("replaced", ())  # relative to other weights, such as a random head's
        known = {n: s for n, s in sizes.items() if n in record["sites"] and not within(n, replaced)}
        problems += resized(known, record["sites"])
    used = refuse(f"{folder} was not loaded", problems, allowed)
    probe = record["probe"] if record and not other else None
    return Loaded(folder, deltas, probe, record is None, frozenset(allowed), frozenset(used))


def load(
    model: nn.Module,
    folder: str | Path | Loaded,
    name: str = "default",
    *,
    allow: str | Iterable[str] = (),
    trainable: bool = False,
    initial: str | Path | None = None,
) -> nn.Module:
    """Attaches the adapter in `folder` as `name`, acting at strength 1, and returns the model.

    folder, allow, initial: as in `read`; a run's folder stands for its adapter. trainable: let the adapter
    alone take gradients. Raises the errors of `read`, and FormatError if the golden probe fails or an adapter
    of another program has no effect on the outputs; the model is then as it was.
    """
    hooks.check_name(model, name)
    if isinstance(folder, Loaded):
        if allow or initial:
            raise ConfigError("load: pass allow= and initial= to veneer.read, which has read this adapter")
        found = folder
    else:
        found = read(model, folder, allow=allow, initial=initial)
    check_fresh(model, found)
    hooks.refuse_clash(site for site, _ in found.changes)
    hooks.hang(model, name, found.changes)
    try:
        used = refuse_effect(model, found, golden.through(model, name))
    except BaseException:
        hooks.take_off(model, [name])
        raise
    for _, delta in found.changes:
        delta.requires_grad_(False)
        vars(delta)["let_through"] = sorted(used)
    if trainable:
        switch.train_only(model, name)
        calls.watch(model)
    return model


def _deltas(
    model: nn.Module, found: Opened, initial: dict[str, Tensor] | None
) -> tuple[Changes, list[Problem]]:
    """Returns the deltas that the opened folder holds for the model, and all problems with them."""
    record = found.manifest
    if found.config is None:
        assert record is not None
        return native.rebuild(model, record, found.tensors)
    own = {n: entry["own"] for n, entry in record["sites"].items()} if record else {}
    if alone.is_alone(found.config):
        changes, problems = alone.to_changes(model, found.config, found.tensors)
    elif settings.method_of(found.config) is Prefix:
        changes, problems = prefixes.to_changes(model, found.config, found.tensors)
    else:
        changes, problems = reading.to_changes(
            model, reading.Source(found.config, found.tensors, own, initial)
        )
    if record is None or problems:
        return changes, problems
    sites, replaced = set(record["sites"]), record["base"].get("replaced", ())
    odd = sites ^ {site.name for site, _ in changes}
    odd = {name for name in odd if name in sites or not within(name, replaced)}
    if odd:
        return changes, [
            Problem(
                "fit",
                f"{manifest.NAME} and {settings.CONFIG} name different layers: {first_few(sorted(odd))}",
            )
        ]
    for site, delta in changes:
        if site.name in sites:
            delta.options = manifest.site_options(record, site.name)
    return changes, []


def _let_through(delta: nn.Module) -> list[str]:
    return list(vars(delta).get("let_through", []))
