"""PEFT's folder: adapter_config.json, and tensors named base_model.model.<module>.lora_A.weight."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer import files, foreign
from veneer.adapt.peft import adapter_names
from veneer.adapt.peft.refusals import settings_problems
from veneer.adapt.peft.settings import CONFIG, KEYS, LONG_KNOWN, PREFIX, TENSORS
from veneer.adapt.peft.starts import PLAIN
from veneer.adapt.peft.targets import at, expressions, targeted
from veneer.adapt.store import manifest
from veneer.convert import tensor_files
from veneer.convert.base import Base
from veneer.convert.detect import Found
from veneer.convert.leftovers import Leftovers
from veneer.convert.pairs import Kind, Pair, Pairs, bare, only
from veneer.convert.tensor_roles import Roles, by_module
from veneer.errors import FormatError, first_few

LINEAR = {".lora_A.weight": "A", ".lora_B.weight": "B"}
EMBEDDING = {".lora_embedding_A": "eA", ".lora_embedding_B": "eB"}
MAGNITUDE = ".lora_magnitude_vector"
# The second form of the magnitude is PEFT's before 0.12.
NAMES = {**LINEAR, **EMBEDDING, MAGNITUDE: "m", f"{MAGNITUDE}.weight": "m"}
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern", "alpha": "alpha_pattern"}


def read(found: Found, base: Base, rest: Leftovers) -> Pairs:
    """Returns the pairs in a PEFT folder whose adapter is relative to the unchanged base."""
    config = {**KEYS, **found.config}
    _check(found, config)
    tensors = adapter_names.without(tensor_files.tensors(found.file))
    odd = [k for k in tensors if not k.startswith(PREFIX)]
    for name in odd:
        rest.add(name, f"tensors whose names do not begin with {PREFIX}")
    named = {k.removeprefix(PREFIX): t for k, t in tensors.items() if k not in odd}
    layers = {k.partition(".lora_")[0] for k in named}
    foreign.check_expressions(expressions(config), layers, CONFIG)
    sites = {n: _pair(n, config, roles) for n, roles in by_module(named, NAMES, rest, needed=()).items()}
    _agree(config, sites)
    for entry in _entries(config):
        if not any(n == entry or n.endswith(f".{entry}") for n in sites):
            rest.add(entry, "target_modules without tensors in the file")
    return Pairs(
        sites,
        dropout=float(config["lora_dropout"] or 0.0),
        origin=config["base_model_name_or_path"],
        task=config["task_type"],
        transposed=bool(config["fan_in_fan_out"]),
    )


def _check(found: Found, config: Mapping[str, Any]) -> None:
    """Raises FormatError for settings under which the adapter is not just pairs on the unchanged base."""
    wrong = settings_problems(found.config, has_initial=False, only_pairs=True)
    start = config["init_lora_weights"]
    if not wrong and config["peft_type"] != "LORA":
        wrong = [
            f"peft_type {config['peft_type']!r} is not LoRA; its change must be factored on the base: give"
            " model="
        ]
    if not wrong and (start.lower() if isinstance(start, str) else start) not in PLAIN:
        wrong = [
            f"init_lora_weights {start!r} changed the base's weights; the original base is needed: give"
            " model="
        ]
    if wrong:
        raise FormatError(
            f"{found.folder / CONFIG} cannot be converted:\n" + "\n".join(f"- {w}" for w in wrong)
        )
    record = manifest.record_of(found.folder)
    if (
        record
        and record["tensors"]["file"] == found.file.name
        and files.sha256(found.file) != record["tensors"]["sha256"]
    ):
        raise FormatError(
            f"{found.file} does not match {manifest.NAME}; the file was changed or a save was interrupted;"
            " restore it from a copy"
        )


def _pair(name: str, config: Mapping[str, Any], roles: Roles) -> Pair:
    embedding = "eA" in roles or "eB" in roles
    A, B = (roles.get("eA"), roles.get("eB")) if embedding else (roles.get("A"), roles.get("B"))
    if A is None or B is None:
        raise FormatError(
            f"{name} must have factors A and B, got only {', '.join(sorted(roles))}; the file is incomplete"
        )
    own, m = at(config, name), roles.get("m")
    r = own["r"]
    scaling = own["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)
    kind: Kind = "embedding" if embedding else "conv" if A.ndim > 2 else "linear"
    return Pair(A, B.flatten(1), scaling, None if m is None else m.flatten(), kind)


def _agree(config: Mapping[str, Any], sites: Mapping[str, Pair]) -> None:
    """Raises FormatError if rank, layers or method in the settings contradict the tensors."""
    ranks = {n: at(config, n)["r"] for n in sites}
    wrong = [
        f"{n}: rank {p.rank} in the file, {ranks[n]} in the settings"
        for n, p in sites.items()
        if p.rank != ranks[n]
    ]
    if config["target_modules"] not in (None, "all-linear"):
        wrong += [
            f"{n} is in the file, but not in target_modules" for n in sites if not targeted(dict(config), n)
        ]
    n_dora = sum(p.magnitude is not None for p in sites.values())
    if n_dora != (len(sites) if config["use_dora"] else 0):
        wrong.append(
            f"use_dora is {bool(config['use_dora'])}, but {n_dora} of {len(sites)} layers have a magnitude"
        )
    if wrong:
        raise FormatError(f"{CONFIG} contradicts the tensors: {first_few(wrong)}")


def _entries(config: Mapping[str, Any]) -> list[str]:
    targets = config["target_modules"]
    return [] if targets is None or isinstance(targets, str) else list(targets)


def write(pairs: Pairs, folder: Path, base: Base) -> list[str]:
    """Writes the folder, completely or not at all; rounds nothing."""
    pairs = bare(pairs)
    content = settings(pairs, base)
    with files.replacing(folder / TENSORS, folder / CONFIG) as (tensors, config):
        files.write_tensors(tensors, named(pairs))
        files.write_json(config, content)
    return []


def named(pairs: Pairs) -> dict[str, Tensor]:
    """Returns the tensors under PEFT's names and in its shapes."""
    found: dict[str, Tensor] = {}
    for n, p in pairs.sites.items():
        ones = (1,) * (p.A.ndim - 2)
        ends = EMBEDDING if p.kind == "embedding" else LINEAR
        found |= {
            f"{PREFIX}{n}{end}": t for end, t in zip(ends, (p.A, p.B.reshape(*p.B.shape, *ones)), strict=True)
        }
        if p.magnitude is not None:
            found[f"{PREFIX}{n}{MAGNITUDE}"] = p.magnitude.reshape(1, -1, *ones) if ones else p.magnitude
    return found


def settings(pairs: Pairs, base: Base) -> dict[str, Any]:
    """Returns adapter_config.json. Raises FormatError for a mixture of LoRA and DoRA: PEFT has one method."""
    dora = {p.magnitude is not None for p in pairs.sites.values()}
    if len(dora) > 1:
        raise FormatError("only some layers have a magnitude (DoRA); PEFT supports one method for all layers")
    only(pairs, ("linear", "conv", "embedding"), "PEFT", magnitude=True)
    config = {
        **LONG_KNOWN,
        "base_model_name_or_path": pairs.origin,
        "fan_in_fan_out": pairs.transposed or base.transposed,
        "lora_dropout": pairs.dropout,
        "target_modules": targets_of(pairs.sites, base.names),
        "task_type": pairs.task,
        **({"use_dora": True} if dora == {True} else {}),
    }
    ranks = {n: float(p.rank) for n, p in pairs.sites.items()}
    alphas = {n: p.scaling * p.rank for n, p in pairs.sites.items()}
    for key, values in (("r", ranks), ("lora_alpha", alphas)):
        config[key], config[PATTERNS[key]] = pattern(key, values)
    return config


def targets_of(sites: Iterable[str], names: tuple[str, ...]) -> list[str]:
    """Returns name endings that match exactly these layers of the model; full names if no endings do."""
    wanted = set(sites)
    short = sorted({n.rsplit(".", 1)[-1] for n in wanted})
    meant = {n for n in names if any(n == e or n.endswith(f".{e}") for e in short)}
    return short if meant == wanted else sorted(wanted)


def pattern(key: str, values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Returns the most common value and {name: value} of the others.

    A name becomes a regular expression if the plain name would match other layers too.
    """
    whole = {n: int(v) if float(v).is_integer() else v for n, v in values.items()}
    common = Counter(whole.values()).most_common(1)[0][0]
    others = {n: v for n, v in whole.items() if v != common}
    if any(at({key: common, PATTERNS[key]: others}, n)[key] != v for n, v in whole.items()):
        others = {f"^{re.escape(n)}": v for n, v in others.items()}
    return common, others
