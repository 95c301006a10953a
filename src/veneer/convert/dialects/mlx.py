"""mlx-lm: lora_a (in, r), lora_b (r, out), a scale not divided by the rank, layers counted from the last.

https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md
"""

from __future__ import annotations

import re
from pathlib import Path

from veneer import files
from veneer.adapt.peft.settings import CONFIG
from veneer.convert import tensor_files
from veneer.convert.base import Base
from veneer.convert.detect import Found
from veneer.convert.leftovers import Leftovers
from veneer.convert.pairs import Pair, Pairs, bare, only, uniform
from veneer.convert.tensor_roles import Roles, by_module
from veneer.errors import FormatError, first_few

TENSORS = "adapters.safetensors"
ENDINGS = {".lora_a": "A", ".lora_b": "B", ".m": "m"}
EMBEDDINGS = {"embed_tokens", "wte", "wpe", "tok_embeddings", "word_embeddings", "embeddings"}
LAYER = re.compile(r"(.*\.(?:layers|h|blocks))\.(\d+)\.(.+)")


def read(found: Found, base: Base, rest: Leftovers) -> Pairs:
    """Returns the pairs in an mlx-lm folder."""
    kind = found.config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise FormatError(
            f"{found.folder}: fine_tune_type must be 'lora' or 'dora', got {kind!r}; other types are not"
            " adapters"
        )
    given = found.config.get("lora_parameters") or {}
    if "scale" not in given:
        raise FormatError(
            f"{found.folder / CONFIG} lacks lora_parameters.scale, which the change depends on; add it"
        )
    modules = by_module(tensor_files.tensors(found.file), ENDINGS, rest)
    experts = [m for m, roles in modules.items() if roles["A"].ndim != 2]
    if experts:
        raise FormatError(f"adapters of stacked experts are not supported: {first_few(experts)}")
    ranks = {m: roles["A"].shape[1] for m, roles in modules.items()}
    wrong = [
        f"{m}: rank {r} in the file, {given.get('rank')} in the settings"
        for m, r in ranks.items()
        if r != given.get("rank")
    ]
    odd = [m for m, roles in modules.items() if ("m" in roles) != (kind == "dora")]
    wrong += [
        f"{m} has {'no' if kind == 'dora' else 'a'} magnitude, but fine_tune_type is {kind}" for m in odd
    ]
    if wrong:
        raise FormatError(f"{CONFIG} contradicts the tensors: {first_few(wrong)}")
    return Pairs(
        {m: _pair(m, roles, float(given["scale"]), base) for m, roles in modules.items()},
        dropout=float(given.get("dropout") or 0.0),
        origin=found.config.get("model"),
    )


def _pair(name: str, roles: Roles, scale: float, base: Base) -> Pair:
    embedding = name in base.embeddings if base.names else name.rsplit(".", 1)[-1] in EMBEDDINGS
    return Pair(
        roles["A"].mT.contiguous(),
        roles["B"].mT.contiguous(),
        scale,
        roles.get("m"),
        "embedding" if embedding else "linear",
    )


def write(pairs: Pairs, folder: Path, base: Base) -> list[str]:
    """Writes the folder, completely or not at all.

    Module names under `model.layers` are those of transformers. Raises FormatError for other modules,
    convolutions, and a mixture of LoRA and DoRA.
    """
    ready, notes = uniform(bare(pairs))
    only(ready, ("linear", "embedding"), "mlx-lm", magnitude=True)
    dora = {p.magnitude is not None for p in ready.sites.values()}
    if len(dora) > 1:
        raise FormatError(
            "only some layers have a magnitude (DoRA); mlx-lm supports one method for all layers"
        )
    other = [
        n
        for n in ready.sites
        if not re.fullmatch(r"((language_model\.)?model\.(layers\.\d+\..+|embed_tokens)|lm_head)", n)
    ]
    if other:
        raise FormatError(f"mlx-lm names the modules of this model differently: {first_few(other)}")
    some = next(iter(ready.sites.values()))
    config = {
        "model": pairs.origin,
        "fine_tune_type": "dora" if dora == {True} else "lora",
        "num_layers": _layers(ready, base),
        "lora_parameters": {
            "rank": some.rank,
            "scale": some.scaling,
            "dropout": ready.dropout,
            "keys": _keys(ready),
        },
    }
    tensors = {f"{n}.lora_a": p.A.mT for n, p in ready.sites.items()} | {
        f"{n}.lora_b": p.B.mT for n, p in ready.sites.items()
    }
    tensors |= {f"{n}.m": p.magnitude for n, p in ready.sites.items() if p.magnitude is not None}
    with files.replacing(folder / TENSORS, folder / CONFIG) as (path, settings):
        files.write_tensors(path, tensors)
        files.write_json(settings, config)
    return notes


def _keys(pairs: Pairs) -> list[str]:
    """Returns names within a layer; full names for modules outside layers."""
    return sorted({m[3] if (m := LAYER.fullmatch(n)) else n for n in pairs.sites})


def _layers(pairs: Pairs, base: Base) -> int:
    """Returns the number of adapted layers, counted from the last, or -1 for all.

    -1 is always safe: mlx-lm starts layers without tensors as no change.
    """
    first = min((int(m[2]) for n in pairs.sites if (m := LAYER.fullmatch(n))), default=None)
    return base.layers - first if base.layers and first is not None else -1
