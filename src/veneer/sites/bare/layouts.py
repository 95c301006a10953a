"""Knows which parameters of a module are matrices, and which of their dimensions is the input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

UP, DOWN = ("gate_up_proj", "gate_proj", "up_proj"), "down_proj"
PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention


class Matrix(NamedTuple):
    """A matrix of a bare parameter. place: its number in a stack, or None; transposed: kept (in, out)."""

    parameter: str
    place: int | None
    transposed: bool


def matrices_of(module: nn.Module) -> Iterator[Matrix]:
    """Yields the matrices that a module holds as bare parameters, in a layout known here."""
    if isinstance(module, nn.RNNBase):
        yield from (Matrix(n, None, False) for n in own(module) if n.startswith("weight_"))
    elif isinstance(module, nn.MultiheadAttention):
        yield from (Matrix(n, None, False) for n in own(module) if n in PACKED)
    else:
        for n, p in stacks(module).items():
            transposed = is_transposed(module, n)
            if transposed is not None:
                yield from (Matrix(n, i, transposed) for i in range(len(p)))


def own(module: nn.Module) -> dict[str, Tensor]:
    """Returns the module's own floating-point parameters of 16 bits or more by name."""
    found = {n: p for n, p in module._parameters.items() if p is not None}
    return {n: p for n, p in found.items() if p.is_floating_point() and p.element_size() > 1}


def stacks(module: nn.Module) -> dict[str, Tensor]:
    """Returns the module's own stacks of matrices (n, .., ..), such as fused experts, by name."""
    return {n: p for n, p in own(module).items() if p.ndim == 3 and min(p.shape) > 1}


def is_transposed(module: Any, parameter: str) -> bool | None:
    """Returns True if the matrices of a stack are kept (in, out), False for (out, in), None if unknown.

    The first of these that tells: the shapes of `gate_up_proj` (2 f of one side) and `down_proj` together,
    transformers' attribute `is_transposed`, the sizes that the module or its configuration names.
    """
    shapes = {n: tuple(p.shape[1:]) for n, p in stacks(module).items()}
    if parameter == "weight":
        return _by_sizes(shapes[parameter], getattr(module, "output_size", None), _size(module, "input_size"))
    if parameter not in (*UP, DOWN):
        return None
    if shapes.keys() >= {UP[0], DOWN}:
        (a, b), (c, d) = shapes[UP[0]], shapes[DOWN]
        plain, turned = (b == c and a == 2 * d), (a == d and b == 2 * c)
        if plain != turned:
            return turned
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    hidden = _size(module, "hidden_size") or _size(module, "hidden_dim")
    return _by_sizes(shapes[parameter], *((None, hidden) if parameter in UP else (hidden, None)))


def _size(module: Any, name: str) -> int | None:
    found = getattr(module, name, None) or getattr(getattr(module, "config", None), name, None)
    return found if isinstance(found, int) else None


def _by_sizes(shape: tuple[int, ...], out: int | None, in_: int | None) -> bool | None:
    """Returns True for (in, out) and False for (out, in), by the sizes that are known; None if both fit."""
    fits = [
        all(want in (None, have) for want, have in zip(wanted, shape, strict=True))
        for wanted in ((out, in_), (in_, out))
    ]
    return None if (out is None and in_ is None) or fits[0] == fits[1] else fits[1]
