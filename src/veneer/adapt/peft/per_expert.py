"""Reads a pair for each projection of each expert, as vLLM and PEFT before transformers 5 keep them.

`<module>.experts.<e>.gate_proj`, `up_proj` and `down_proj` become changes of the fused parameters. Gate and
up with one A keep their rank; with two, the change has the sum of the ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.attached import Changes
from veneer.adapt.peft.settings import PREFIX
from veneer.adapt.peft.targets import Config, at
from veneer.methods.lora import LoRA
from veneer.sites.bare.site import Holder, ParameterSite
from veneer.sites.finding.kinds import layers_of

NAME = re.compile(
    rf"{re.escape(PREFIX)}(?P<expert>.*\.experts\.\d+)\.(?P<part>gate_proj|up_proj|down_proj)"
    r"\.lora_(?P<role>[AB])\.weight"
)
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Found(NamedTuple):
    """The changes, the tensors that they used, and the parts of names that stand for them in the settings."""

    changes: Changes
    used: set[str]
    parts: set[str]


def read(model: nn.Module, config: Config, tensors: Mapping[str, Tensor]) -> Found:
    """Returns the changes of fused experts that the tensors name one by one."""
    found = Found([], set(), set())
    if not LoRA.reads_peft(config):
        return found
    named = [m for key in tensors if (m := NAME.fullmatch(key))]
    layers = layers_of(model)
    for expert in dict.fromkeys(m["expert"] for m in named):
        for parameter, parts in PARTS.items():
            holder = layers.get(f"{expert}.{parameter}")
            if isinstance(holder, Holder):
                _add(found, ParameterSite(f"{expert}.{parameter}", holder), parts, config, tensors)
    return found


def _add(
    found: Found, site: ParameterSite, parts: Sequence[str], config: Config, tensors: Mapping[str, Tensor]
) -> None:
    """Adds the change of one matrix, if its parts have pairs that fit."""
    expert = site.name.rpartition(".")[0]
    keys = {p: [f"{PREFIX}{expert}.{p}.lora_{role}.weight" for role in "AB"] for p in parts}
    there = [p for p in parts if all(k in tensors for k in keys[p])]
    pairs = {p: (tensors[keys[p][0]], tensors[keys[p][1]]) for p in there}
    if not there or not all(_fits(site, *pair, len(parts)) for pair in pairs.values()):
        return
    scaled = {p: _scaled(*pair, at(config, f"{expert}.{p}")) for p, pair in pairs.items()}
    A, B = _together(site, [scaled.get(p) for p in parts])
    found.changes.append((site, LoRA.holding(site, A, B, alpha=len(A))))
    found.used.update(k for p in there for k in keys[p])
    found.parts.update(there)


def _fits(site: ParameterSite, A: Tensor, B: Tensor, parts: int) -> bool:
    """Returns True if the factors have the shapes of one of the matrix's parts."""
    return (*A.shape[1:], *B.shape[:1]) == (site.in_, site.out // parts) and A.shape[:1] == B.shape[1:]


def _scaled(A: Tensor, B: Tensor, settings: Config) -> tuple[Tensor, Tensor]:
    r = len(A)
    return A, B * (settings["lora_alpha"] / (math.sqrt(r) if settings.get("use_rslora") else r))


def _together(site: ParameterSite, pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Returns A and B of the whole matrix; a part without a pair stays unchanged."""
    given = [p for p in pairs if p is not None]
    (first, like), *_ = given
    shared = all(torch.equal(A, first) for A, _ in given) and len(given) == len(pairs)
    ranks = [0 if p is None else len(p[0]) for p in pairs]
    rows = []
    for i, pair in enumerate(pairs):
        B = like.new_zeros(site.out // len(pairs), 0) if pair is None else pair[1]
        if not shared:
            B = torch.cat(
                [B.new_zeros(len(B), sum(ranks[:i])), B, B.new_zeros(len(B), sum(ranks[i + 1 :]))], 1
            )
        rows.append(B)
    A = first if shared else torch.cat([A for A, _ in given])
    interleaved = getattr(site.host, "is_concatenated", True) is False
    return A, torch.stack(rows, 1).flatten(0, 1) if interleaved else torch.cat(rows)
