"""Measures how positions turn the keys of a model's attentions, to move trained keys along a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.adapt.probe import TOLERANCE
from veneer.adapt.probe_inputs import default_inputs
from veneer.adapt.switch import using

FAR = 37  # positions between the two places that are compared
CHANGING = (
    "dynamic",
    "longrope",
)  # kinds of rotary positions whose frequencies depend on the length of the text


class Turn(NamedTuple):
    """A layer's rotation: radians per position for each pair of numbers, empty if it ignores positions.

    neighbours: pairs are numbers 0 and 1, 2 and 3 and so on; else number i and number i + n of n pairs.
    """

    radians: Tensor
    neighbours: bool


def turned(keys: Tensor, turn: Turn, distance: int) -> Tensor:
    """Returns keys (.., head_dim) moved on by `distance` positions; numbers behind the last pair are
    unchanged.
    """
    n, angle = turn.radians.numel(), distance * turn.radians.double()
    part, rest = keys[..., : 2 * n], keys[..., 2 * n :]
    a, b = (part[..., ::2], part[..., 1::2]) if turn.neighbours else part.chunk(2, -1)
    cos, sin = angle.cos().to(keys), angle.sin().to(keys)
    moved = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat(
        [torch.stack(moved, -1).flatten(-2) if turn.neighbours else torch.cat(moved, -1), rest], -1
    )


@torch.no_grad()
def turns(model: nn.Module) -> list[Turn] | str:
    """Returns the rotation of every layer of a language model, or the reason why it is unknown.

    It is measured: the same tokens are read from two positions, and each layer's keys must be one another's,
    turned.
    """
    changing = [kind for kind in _rotary_kinds(getattr(model, "config", None)) if kind in CHANGING]
    if changing:
        return f"the frequencies of its positions change with the length of the text ({changing[0]})"
    radians = list(
        {tuple(t.flatten().tolist()): t for n, t in model.named_buffers() if n.endswith("inv_freq")}.values()
    )
    if not radians:
        return "its positions are not rotary"
    try:
        here, there = (_keys(model, start) for start in (0, FAR))
    except Exception as e:  # a model may need other inputs, or keep no keys, and then says so in its own way
        return f"its keys could not be read ({type(e).__name__})"
    none = torch.tensor([])
    known = [Turn(t.flatten(), beside) for t in (none, *radians) for beside in (False, True)]
    found = [
        next((turn for turn in known if _fits(turn, a, b)), None) for a, b in zip(here, there, strict=True)
    ]
    odd = [str(i) for i, turn in enumerate(found) if turn is None]
    return (
        f"its keys depend on positions in another way (layer {odd[0]})"
        if odd
        else [turn for turn in found if turn]
    )


def _rotary_kinds(config: Any) -> Iterator[str]:
    """Yields the entries `rope_type` of a configuration, one or one per kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    for part in (found, *(v for v in found.values() if isinstance(v, Mapping))):
        if "rope_type" in part:
            yield part["rope_type"]


def _keys(model: nn.Module, start: int) -> list[Tensor]:
    """Returns every layer's keys (1, heads, t, head_dim) of a fixed text from position `start` on, adapters
    off.
    """
    given = default_inputs(model) or {}
    ids = given["input_ids"]
    places = torch.arange(start, start + ids.shape[1], device=ids.device)
    with evaluating(model), using(model):
        return [
            layer.keys
            for layer in model(**given, position_ids=places[None], use_cache=True).past_key_values.layers
        ]


def _fits(turn: Turn, here: Tensor, there: Tensor) -> bool:
    if 2 * turn.radians.numel() > here.shape[-1]:
        return False
    tolerance = 4 * TOLERANCE.get(str(here.dtype).removeprefix("torch."), TOLERANCE["bfloat16"])
    return bool((turned(here, turn, FAR) - there).norm() <= tolerance * there.norm())
