"""`veneer convert`: an adapter from one program's format into another's, with all that was rounded or left out said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from veneer import dtypes
from veneer.adapt import combine
from veneer.adapt.peft.settings import method_of
from veneer.adapt.store import manifest, store
from veneer.adapt.store.folder import adapter_folder
from veneer.convert import carry, pairs
from veneer.convert.base import Base, of_model
from veneer.convert.detect import NATIVE, Found, detect
from veneer.convert.pairs import Kind, Pair, Pairs
from veneer.errors import ConfigError, FormatError, first_few, suggest
from veneer.files import check_new, replacing, write_json
from veneer.models import adapted, pretrained
from veneer.models.pretrained import skeleton

RECORD = "convert.json"
ALSO = {"mlx-lm": "mlx", "lycoris": "kohya"}  # other names of formats
PLAIN_ONLY = ("vllm", "litgpt")  # dialects without DoRA


@dataclass(frozen=True)
class Conversion:
    """What was converted. notes: what was rounded, padded or cut; left_out: what the source held and the result does not."""

    source: str
    dialect: str
    to: str
    out: str
    layers: int
    ranks: list[int]
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def convert(
    adapter: str,
    *,
    out: str,
    to: str = "peft",
    model: str | None = None,
    names: str | None = None,
    part: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    allow: Sequence[str] = (),
) -> Conversion:
    """Writes the adapter in another program's format, whatever format it is in, and says what was rounded or left out.

    adapter: a folder or a file of tensors, of PEFT, kohya or LyCORIS, diffusers, torchtune, mlx-lm, LitGPT or veneer
    out: folder of the result; must not exist
    to: peft, kohya, diffusers, torchtune, mlx, litgpt or vllm (plain LoRA of one legal rank, which other servers read too)
    model: the base, where names or sizes of its layers, or its weights, are needed
    names: file with the names of the base's modules, one a line, where there is no model to load
    part: of a diffusers pipeline: the one to take, or the one that the adapter changes, such as unet
    rank: cut to this rank; needed, or energy, to make plain LoRA of a change that is none
    energy: cut, keeping this share of the squared norm, such as 0.99
    dtype: of the factors in the result: fp32, bf16 or fp16; unchanged unless given
    allow: names of tensors or settings that may be left out, with * for any text
    """
    source, folder = adapter_folder(Path(adapter)), Path(out)
    to = ALSO.get(to, to)
    if to not in carry.WRITERS:
        raise ConfigError(f"to: unknown format {to!r}{suggest(to, carry.WRITERS)}")
    number_format = dtypes.of_name(dtype) if dtype is not None else None
    check_new(folder)
    found, base = detect(source), _base(model, names)
    ready, notes = _pairs(found, base, model, to, (rank, energy), allow)
    if part:
        ready = pairs.take_part(ready, part)
    if number_format is not None:
        ready, said = pairs.to_dtype(ready, number_format)
        notes += said
    notes += carry.write(ready, folder, to, base=base)
    ranks = sorted({p.rank for p in ready.sites.values()})
    done = Conversion(
        str(source), found.dialect, to, str(folder), len(ready.sites), ranks, notes, list(ready.left_out)
    )
    with replacing(folder / RECORD) as (path,):
        write_json(path, done.as_dict())
    return done


def _base(model: str | None, names: str | None) -> Base:
    if names is not None and not Path(names).is_file():
        raise ConfigError(f"names: there is no file {names}")
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
) -> tuple[Pairs, list[str]]:
    """The adapter as pairs that `to` can hold: as they are, cut, or made on the base itself where they are none otherwise."""
    command = f"veneer convert {found.folder} --to {to} --out OUT --model BASE"
    other = _otherwise(found)
    if other and model is None:
        raise FormatError(
            f"{found.file} is {other}: the file has no factors of LoRA, but its base's layers make some of it:\n  {command}"
        )
    if other and model is not None:
        ready, notes = _on_base(found, model, cut, command)
        return ready, [f"{other} is written as plain LoRA", *notes]
    if found.dialect == "peft" and model is not None and _moves_base(found):
        ready, notes = _on_base(found, model, cut, command)
        return ready, [
            *notes,
            f"the start {found.config['init_lora_weights']!r} is written out, so that the ranks are twice the trained ones",
        ]
    ready = carry.read_found(found, base, allow)
    dora = any(p.magnitude is not None for p in ready.sites.values())
    if dora and (to in PLAIN_ONLY or cut != (None, None)):
        if model is None or cut == (None, None):
            raise FormatError(
                f"{found.file} is DoRA, which {to} does not have; make it plain LoRA of a rank that you choose:\n  {command} --rank 64"
            )
        if found.dialect != "peft":
            raise FormatError(
                f"{found.file} is DoRA, which {to} does not have; convert it to peft first, and that to {to}:\n  {command} --rank 64"
            )
        return _on_base(found, model, cut, command)
    return pairs.cut(ready, *cut) if cut != (None, None) else (ready, [])


def _otherwise(found: Found) -> str | None:
    """What the adapter is, where only its base's layers make factors of it: kept in our own layout, or another kind of PEFT's."""
    if found.dialect == NATIVE:
        record = manifest.record_of(found.folder)
        return f"{record['method'] if record else 'a change'} in Veneer's own layout"
    other = (
        found.dialect == "peft"
        and found.config.get("peft_type", "LORA") != "LORA"
        and method_of(found.config) is not None
    )
    return f"PEFT's {found.config['peft_type']}" if other else None


def _moves_base(found: Found) -> bool:
    return str(found.config.get("init_lora_weights")).lower() in ("pissa", "olora")


@torch.no_grad()
def _on_base(
    found: Found, model: str, cut: tuple[int | None, float | None], command: str
) -> tuple[Pairs, list[str]]:
    """The change on the base's own weights as plain LoRA, of the rank that is asked for, with what the cut lost.

    Without one it must be a product of two factors, and they are taken as they are.
    """
    packed = adapted.format_of([adapted.Wanted("adapter", found.folder, 1.0)], model)
    base = pretrained.causal_lm(model, torch.float32, torch.device("cpu"), packed)
    store.load(base, found.folder, "adapter")
    notes, name = [], "adapter"
    if cut != (None, None):
        cuts = combine.to_lora(base, name, "plain", rank=cut[0], energy=cut[1])
        worst = max(cuts, key=lambda c: c.error)
        kept = 1 - worst.error**2
        notes.append(
            f"cut to ranks of at most {max(c.rank for c in cuts)}; {worst.site} kept least, {kept:.1%} of its energy"
        )
        name = "plain"
    sites = {}
    for site, delta in combine.of_matrices(base, name):
        f = delta.factors(site)
        if f is None or not f.is_product:
            raise FormatError(
                f"{found.file} changes {site.name!r} by no product of two factors; cut it to the nearest one of a rank:\n"
                f"  {command} --rank 64"
            )
        kind: Kind = "linear" if site.kind == "transposed" else site.kind  # type: ignore[assignment]
        sites[site.name] = Pair(site.pack(f.A).detach(), f.B.detach(), 1.0, kind=kind)
    return Pairs(
        sites, origin=found.config.get("base_model_name_or_path"), task=found.config.get("task_type")
    ), notes


def text(done: Conversion) -> str:
    """The conversion in a few lines for people."""
    lines = [
        f"{done.source}: {done.dialect} -> {done.to} in {done.out}: {done.layers} layers, ranks {first_few(map(str, done.ranks))}"
    ]
    lines += [f"- {note}" for note in done.notes]
    if done.left_out:
        lines.append(f"- left out: {first_few(done.left_out)}")
    return "\n".join(lines)
