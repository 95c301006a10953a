"""Converts an adapter from one program's format into another's, and reports roundings and omissions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from veneer import dtypes
from veneer.adapt import combine, hooks
from veneer.adapt.attached import changes
from veneer.adapt.peft.settings import method_of
from veneer.adapt.store import manifest, store
from veneer.adapt.store.folder import adapter_folder
from veneer.adapt.tokens.alone import is_alone
from veneer.convert import carry, pairs
from veneer.convert.base import Base, of_model
from veneer.convert.carry import Conversion
from veneer.convert.detect import NATIVE, Found, detect
from veneer.convert.lycoris import exact
from veneer.convert.merged import others
from veneer.convert.merged.holding import described, ranks
from veneer.convert.pairs import Kind, Pair, Pairs
from veneer.errors import ConfigError, FormatError, first_few, option, suggest
from veneer.files import check_new, replacing, write_json
from veneer.models import adapted, pretrained, vocabulary
from veneer.models.pretrained import skeleton

RECORD = "convert.json"
ALSO = {"mlx-lm": "mlx", "lycoris": "kohya"}  # other names of formats
PLAIN_ONLY = ("vllm", "litgpt", "gguf")  # dialects without DoRA


def convert(
    adapter: str,
    *,
    out: str,
    to: str = "peft",
    model: str | None = None,
    names: str | None = None,
    part: str | None = None,
    poly_task: int | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    allow: Sequence[str] = (),
) -> Conversion:
    """Writes the adapter in another program's format, and returns its roundings and omissions.

    adapter: folder or file of PEFT, kohya, LyCORIS, diffusers, torchtune, mlx-lm, LitGPT or Veneer
    out: folder of the result, which must not exist
    to: format: peft, kohya, diffusers, torchtune, mlx-lm, litgpt, vllm (one rank), gguf or veneer (any)
    model: base model, for formats that need names, sizes or weights of its layers
    names: file with the names of the base's modules, one a line, in place of a model
    part: part of a diffusers pipeline to take, or that the adapter changes, such as unet
    poly_task: number of the task to take from PEFT's POLY, which mixes its factors anew for each
    rank: rank to cut to; needed, or energy, to make plain LoRA of another kind of change
    energy: share of the squared norm to keep in a cut, such as 0.99
    dtype: number format of the result: fp32, bf16 or fp16 [that of the source]
    allow: names of tensors or settings to leave out, with * for any text
    """
    source, folder, to = adapter_folder(Path(adapter)), Path(out), ALSO.get(to, to)
    if to not in (*carry.WRITERS, NATIVE):
        raise ConfigError(f"to: unknown format {to!r}{suggest(to, (*carry.WRITERS, NATIVE))}")
    number_format = dtypes.of_name(dtype) if dtype is not None else None
    check_new(folder)
    found, base = detect(source), _base(model, names)
    if to == NATIVE:
        return _record(_to_veneer(found, model, folder, (rank, energy), number_format, poly_task))
    exactly = (part, rank, energy, dtype) == (None,) * 4
    if exactly and (done := exact.converted(found, to, folder, base)) is not None:
        return _record(Conversion(str(source), found.dialect, to, str(folder), *done))
    ready, notes = _pairs(found, base, model, to, (rank, energy), allow, poly_task)
    ready = pairs.take_part(ready, part) if part else ready
    ready, said = pairs.to_dtype(ready, number_format) if number_format else (ready, [])
    notes += said + carry.write(ready, folder, to, base=base)
    ranks, left = sorted({p.rank for p in ready.sites.values()}), list(ready.left_out)
    return _record(
        Conversion(str(source), found.dialect, to, str(folder), len(ready.sites), ranks, notes, left)
    )


def _record(done: Conversion) -> Conversion:
    with replacing(Path(done.out) / RECORD) as (path,):
        write_json(path, done.as_dict())
    return done


def _base(model: str | None, names: str | None) -> Base:
    if names is not None and not Path(names).is_file():
        raise ConfigError(f"{option('names')}: the file {names} does not exist")
    base = of_model(skeleton(model)) if model else Base()
    own = Path(names).read_text(encoding="utf-8").split() if names else []
    return replace(base, names=(*base.names, *own))


def _pairs(
    found: Found,
    base: Base,
    model: str | None,
    to: str,
    cut: tuple[int | None, float | None],
    allow: Sequence[str],
    task: int | None,
) -> tuple[Pairs, list[str]]:
    """Returns the adapter as pairs that `to` can hold: unchanged, cut, or factored from the dense change."""
    command = f"veneer convert {found.folder} --to {to} --out OUT --model BASE"
    other = _otherwise(found)
    if other and model is None:
        raise FormatError(
            f"{found.file} is {other}: the file has no factors of LoRA; make them on the base's layers:\n"
            f"  {command}"
        )
    if other and model is not None:
        ready, notes = _on_base(found, model, cut, command, task)
        return ready, [f"{other} is written as plain LoRA", *notes]
    if found.dialect == "peft" and model is not None and _moves_base(found):
        ready, notes = _on_base(found, model, cut, command)
        return ready, [
            *notes,
            f"the start {found.config['init_lora_weights']!r} is written out: ranks are twice those trained",
        ]
    ready = carry.read_found(found, base, allow)
    dora = any(p.magnitude is not None for p in ready.sites.values())
    if dora and (to in PLAIN_ONLY or cut != (None, None)):
        if model is None or cut == (None, None):
            raise FormatError(
                f"{found.file} is DoRA, which {to} lacks; make it plain LoRA of a rank of your choice:\n"
                f"  {command} --rank 64"
            )
        if found.dialect != "peft":
            raise FormatError(
                f"{found.file} is DoRA, which {to} lacks; convert it to peft first, and that to {to}:\n"
                f"  {command} --rank 64"
            )
        return _on_base(found, model, cut, command)
    return pairs.cut(ready, *cut) if cut != (None, None) else (ready, [])


def _otherwise(found: Found) -> str | None:
    """Returns the kind of an adapter whose file holds no factors, None for one that does."""
    if found.dialect == NATIVE:
        record = manifest.record_of(found.folder)
        return f"{record['method'] if record else 'a change'} in Veneer's own layout"
    other = (
        found.dialect == "peft"
        and found.config.get("peft_type", "LORA") != "LORA"
        and (method_of(found.config) is not None or is_alone(found.config))
    )
    return f"PEFT's {found.config['peft_type']}" if other else others.kind(found)


def _moves_base(found: Found) -> bool:
    return str(found.config.get("init_lora_weights")).lower() in ("pissa", "olora")


def _opened(found: Found, model: str, name: str, task: int | None) -> nn.Module:
    """Returns the base with the adapter attached as `name`, through PEFT where Veneer has no such method."""
    packed = adapted.format_of([adapted.Wanted(name, found.folder, 1.0)], model)
    base = pretrained.causal_lm(model, torch.float32, torch.device("cpu"), packed)
    vocabulary.grown(base, [found.folder])
    if others.kind(found):
        hooks.hang(base, name, others.to_changes(base, found, task))
    else:
        store.load(base, found.folder, name)
    return base


def _cut(base: nn.Module, cut: tuple[int | None, float | None]) -> tuple[str, list[str]]:
    """Returns the name of the adapter, of its cut to plain LoRA if one is wanted, and notes on the cut."""
    if cut == (None, None):
        return "adapter", []
    cuts = combine.to_lora(base, "adapter", "plain", rank=cut[0], energy=cut[1])
    worst = max(cuts, key=lambda c: c.error)
    kept = 1 - worst.error**2
    most = max(c.rank for c in cuts)
    return "plain", [f"cut to ranks of at most {most}; {worst.site} kept least, {kept:.1%} of its energy"]


@torch.no_grad()
def _to_veneer(
    found: Found,
    model: str | None,
    folder: Path,
    cut: tuple[int | None, float | None],
    dtype: torch.dtype | None,
    task: int | None,
) -> Conversion:
    """Writes the adapter as Veneer saves it, with notes on the layouts of what PEFT merged."""
    if not model:
        raise ConfigError(f"{option('to', NATIVE)} opens the adapter on its base; give {option('model')}")
    if found.dialect not in (NATIVE, "peft") and not others.kind(found):
        raise ConfigError(
            f"{found.file} is of {found.dialect}; convert it to peft, which Veneer opens directly"
        )
    base = _opened(found, model, "adapter", task)
    name, notes = _cut(base, cut)
    own = changes(base, name)
    notes += described(own) if others.kind(found) else []
    store.save(base, folder, name, dtype=dtype)
    return Conversion(str(found.folder), found.dialect, NATIVE, str(folder), len(own), ranks(own), notes)


@torch.no_grad()
def _on_base(
    found: Found, model: str, cut: tuple[int | None, float | None], command: str, task: int | None = None
) -> tuple[Pairs, list[str]]:
    """Returns the change on the base's weights as plain LoRA of the wanted rank, and notes on the cut.

    Without a rank the change must be a product of two factors, which stay unchanged.
    """
    base = _opened(found, model, "adapter", task)
    name, notes = _cut(base, cut)
    sites = {}
    for site, delta in combine.of_matrices(base, name):
        f = delta.factors(site)
        if f is None or not f.is_product:
            raise FormatError(
                f"{found.file} changes {site.name!r} by more than two factors; cut it to a rank, or keep it"
                f" whole with {option('to', NATIVE)}:\n  {command} --rank 64"
            )
        alike = site.kind in ("transposed", "parameter")
        kind: Kind = "linear" if alike else site.kind  # type: ignore[assignment]
        sites[site.name] = Pair(site.pack(f.A).detach(), f.B.detach(), 1.0, kind=kind)
    return Pairs(
        sites, origin=found.config.get("base_model_name_or_path"), task=found.config.get("task_type")
    ), notes


def text(done: Conversion) -> str:
    """Returns the conversion in a few lines for people."""
    ranks = f", ranks {first_few(map(str, done.ranks))}" if done.ranks else ""
    lines = [f"{done.source}: {done.dialect} -> {done.to} in {done.out}: {done.layers} layers{ranks}"]
    lines += [f"- {note}" for note in done.notes]
    if done.left_out:
        lines.append(f"- left out: {first_few(done.left_out)}")
    return "\n".join(lines)
