"""Reads and writes PEFT's prefixes: one table for all layers, whose keys stand p positions before the text.

PEFT lets a text begin at position p behind a prefix of length p; here it begins at 0, as without one. Rotary
keys turned back by p positions give the same outputs, and gradients turned alike. Other kinds of positions
cannot be converted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from veneer import methods
from veneer.adapt.attached import Changes
from veneer.adapt.peft.origin import origin
from veneer.adapt.peft.rotary import Turn, turned, turns
from veneer.adapt.peft.settings import table
from veneer.adapt.peft.targets import Config
from veneer.adapt.peft.writing import Written
from veneer.adapt.store.problems import Problem
from veneer.errors import VeneerError, first_few
from veneer.methods import Delta
from veneer.methods.prefix import Prefix
from veneer.sites import AttentionSite, Site

TENSOR, TASK = "prompt_embeddings", "CAUSAL_LM"


def is_prefix(changes: Changes) -> bool:
    """Returns True if all deltas of the adapter are prefixes."""
    return all(isinstance(delta, Prefix) for _, delta in changes)


def write(model: nn.Module, changes: Changes) -> Written | None:
    """Returns the adapter as PEFT expresses it, or None if it cannot.

    PEFT needs equal prefixes at all layers of a language model with rotary positions.
    """
    prefixes = {_place(site): delta for site, delta in changes if isinstance(delta, Prefix)}
    named, shapes = origin(model, []), {p.K.shape for p in prefixes.values()}
    every = _turns(model)
    if (
        named["task_type"] != TASK
        or len(shapes) > 1
        or isinstance(every, str)
        or sorted(prefixes) != [*range(len(every))]
    ):
        return None
    heads, p, head_dim = shapes.pop()
    parts = [t for i, turn in enumerate(every) for t in (turned(prefixes[i].K, turn, p), prefixes[i].V)]
    own = {
        "num_attention_heads": heads,
        "num_layers": len(every),
        "num_virtual_tokens": p,
        "token_dim": heads * head_dim,
    }
    settings = {k: v for k, v in table(Prefix).always.items() if k != "target_modules"}
    config = {**settings, **own, **named, "peft_type": "PREFIX_TUNING"}
    return Written(config, {TENSOR: torch.stack(parts).detach().permute(2, 0, 1, 3).flatten(1)}, {}, {})


@torch.no_grad()
def to_changes(
    model: nn.Module, config: Config, tensors: Mapping[str, Tensor]
) -> tuple[Changes, list[Problem]]:
    """Returns deltas for the model's attentions, not attached, and all problems with them."""
    problems = [Problem("fit", text) for text in _settings(config)]
    unused = [f"{n} {tuple(t.shape)}" for n, t in tensors.items() if n != TENSOR]
    if unused:
        problems.append(Problem("unused", f"{len(unused)} tensors belong to no layer: {first_few(unused)}"))
    try:
        sites = sorted((s for s in Prefix.find(model, None) if isinstance(s, AttentionSite)), key=_place)
    except VeneerError as e:
        return [], [*problems, Problem("fit", str(e))]
    every, wrong = _turns(model), _misfit(sites, tensors)
    if isinstance(every, str):
        wrong = (
            "PEFT moves the text behind the prefix, and in this model that changes more than the prefix: "
            f"{every}; train a prefix here"
        )
    if wrong or isinstance(every, str):
        return [], [*problems, Problem("fit", wrong)]
    (size,) = {_size(s) for s in sites}
    parts = (
        tensors[TENSOR].unflatten(1, (len(sites), 2, *size)).permute(1, 2, 3, 0, 4)
    )  # (layers, 2, heads, p, head_dim)
    p = parts.shape[3]
    return [
        (s, _prefix(s, turned(K, turn, -p), V)) for s, turn, (K, V) in zip(sites, every, parts, strict=True)
    ], problems


def _settings(config: Config) -> list[str]:
    """Returns settings of adapter_config.json that ask for more than keys and values of a language model."""
    found, task = [], config.get("task_type")
    if task != TASK:
        found.append(f"task_type={task!r}: only prefixes of language models ({TASK}) are read")
    if config.get("num_transformer_submodules") not in (None, 1):
        found.append(
            "num_transformer_submodules: there is a prefix of a decoder beside an encoder's, which is not "
            "known here"
        )
    if config.get("modules_to_save"):
        found.append(
            f"modules_to_save={config['modules_to_save']!r}: layers were trained whole beside the prefix; "
            "merge them in PEFT"
        )
    return found


def _turns(model: nn.Module) -> list[Turn] | str:
    """Returns the turning of keys at every layer, or the reason why shifting a text changes this model."""
    config = getattr(model, "config", None)
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    partial = (
        [k for k in kinds if k != "full_attention"] if kinds else ["sliding_attention"] * (window is not None)
    )
    return f"some layers see a part of the text only ({partial[0]})" if partial else turns(model)


def _misfit(sites: Sequence[AttentionSite], tensors: Mapping[str, Tensor]) -> str:
    """Returns the problem with the tensor for these attentions, or ""."""
    if TENSOR not in tensors:
        return f"missing: {TENSOR}"
    if len({_size(s) for s in sites}) > 1:
        return (
            "the model's attentions have heads of different numbers or sizes, for which PEFT cuts the "
            "prefix; that is not read"
        )
    wanted = 2 * sum(math.prod(_size(s)) for s in sites)
    found = tuple(tensors[TENSOR].shape)
    ok = len(found) == 2 and found[1] == wanted
    return (
        ""
        if ok
        else (
            f"wrong shape: {TENSOR} is {found}, the model asks for (p, {wanted}): keys and values of "
            f"{len(sites)} layers"
        )
    )


def _place(site: Site) -> int:
    """Returns the number of the attention's layer."""
    place: int = site.module.layer_idx
    return place


def _size(site: AttentionSite) -> tuple[int, int]:
    return site.heads, site.head_dim


def _prefix(site: Site, K: Tensor, V: Tensor) -> Delta:
    delta = methods.build(Prefix, site, {"length": K.shape[1]})
    assert isinstance(delta, Prefix)
    delta.K.copy_(K)
    delta.V.copy_(V)
    return delta
