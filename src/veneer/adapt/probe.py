"""The golden probe: a fixed input and some of the outputs with the adapter off and on, kept beside the
adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from veneer.adapt.attached import base_parameters
from veneer.adapt.modes import evaluating
from veneer.adapt.probe_inputs import Record, packed, packed_default, unpacked
from veneer.adapt.switch import using
from veneer.errors import ConfigError
from veneer.sites.blocks import blocks

T = TypeVar("T")
PICKED = 256
# Share of the outputs, those with the smallest errors: attention may flip at a position by rounding alone.
TRUSTED = 0.75
Run = Callable[[Record, bool], Tensor]  # (packed inputs, with the adapter) -> outputs in float32

# Error that rounding makes in outputs, relative to their norm: (a, b) for a + b sqrt(blocks). Three times the
# largest measured on CPUs against float32, on random Llamas of 2 to 80 blocks and SmolLM2-135M: bfloat16 0.7%
# at 2 blocks, 1.3% at 30, 2.1% at 80; float16 0.1%, 0.2%, 0.24%; float32 3e-7, 8e-7, 4e-7. TF32 keeps as many
# bits as float16.
NOISE = {
    "float64": (1.5e-7, 0.0),  # outputs are kept in float32
    "float32": (3e-6, 5e-7),
    "float16": (2.5e-3, 7.5e-4),
    "bfloat16": (2e-2, 6e-3),
}
# Error that rounding of the factors makes in the adapter's effect, relative to the effect's norm.
OF_EFFECT = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# Relative to the largest output: for comparisons of single numbers.
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def through(model: nn.Module, name: str) -> Run:
    """Returns a function that runs the model in eval mode with `name` alone, or with no adapter."""

    @torch.no_grad()
    def run(inputs: Record, adapted: bool) -> Tensor:
        with evaluating(model), using(model, *([name] if adapted else [])):
            return output_of(model(**unpacked(model, inputs)))

    return run


def take(
    model: nn.Module,
    name: str,
    inputs: Mapping[str, Any] | None = None,
    kept_in: torch.dtype | None = None,
    replaced: Sequence[str] = (),
) -> Record | str:
    """Returns the probe of adapter `name` on `inputs` (keyword arguments), or the reason for its absence.

    Without `inputs` language models and classifiers of tokens get a fixed sequence. kept_in: the dtype of the
    adapter's file if narrower than the adapter. replaced: modules that the file replaces whole; outputs
    without the adapter are then not compared. Raises ConfigError for inputs that cannot be kept, and
    anything that the model raises with the adapter on but not off.
    """
    default = packed_default(model) if inputs is None else packed(inputs)
    if isinstance(default, str):
        return default
    run = through(model, name)
    try:
        off = run(default, False)
    except Exception as e:
        if inputs is not None:
            raise
        why = f"the model fails on bare token ids ({type(e).__name__})"
        return f"{why}; pass probe= with the keyword arguments of a call"
    on = run(default, True)
    if not (torch.isfinite(off).all() and torch.isfinite(on).all()):
        return "the outputs are not finite"
    where = list(range(0, off.numel(), max(1, off.numel() // PICKED)))[:PICKED]
    dtypes = [_dtype(model)] + ([str(kept_in).removeprefix("torch.")] if kept_in else [])
    return {
        **({"compared": ["on"]} if replaced else {}),
        "inputs": default,
        "shape": list(off.shape),
        "where": where,
        "off": _numbers(off, where),
        "on": _numbers(on, where),
        "dtype": max(dtypes, key=_tolerance),
        "precision": max([_precision(model), *dtypes], key=_tolerance),
    }


def check(model: nn.Module, run: Run, saved: Record) -> list[str]:
    """Returns the problems if `run` gives other outputs than those kept, else [].

    Compares the base's outputs and the adapter's effect on them, by direction and size. Each may differ by
    the rounding error of a model of this depth and precision. Outputs of a base that the file replaces in
    part are compared with the adapter only.
    """
    off, on = (run(saved["inputs"], adapted) for adapted in (False, True))
    if list(off.shape) != saved["shape"]:
        there = tuple(saved["shape"])
        return [f"probe: the model's output is {tuple(off.shape)}, it was {there} when the adapter was saved"]
    now_off, now_on = (_values(_numbers(y, saved["where"])) for y in (off, on))
    then_off, then_on = (_values(saved[state]) for state in ("off", "on"))
    dtypes = (saved.get("precision", _precision_of(saved["dtype"])), _precision(model))
    depth = math.sqrt(max(1, len(blocks(model))))
    share = max(a + b * depth for a, b in (_of(NOISE, d) for d in dtypes))
    if "off" not in saved.get("compared", ("off", "on")):
        return _far("on", "those", now_on - then_on, share * float(then_on.norm()))
    noise, effect = share * float(torch.maximum(then_off.norm(), then_on.norm())), then_on - then_off
    allowed = max(_of(OF_EFFECT, d) for d in dtypes) * float(effect.norm()) + math.sqrt(2) * noise
    return [
        *_far("off", "those", now_off - then_off, noise),
        *_far("on", "the effect", now_on - now_off - effect, allowed),
    ]


def _values(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _far(state: str, kept: str, error: Tensor, allowed: float) -> list[str]:
    found = float(error.abs().sort().values[: math.ceil(TRUSTED * len(error))].norm())
    if found <= allowed and error.isfinite().all():
        return []
    return [
        f"probe: with the adapter {state}, outputs are {found:.2g} from {kept} kept with it; {allowed:.2g}"
        " is allowed"
    ]


def is_idle(model: nn.Module, run: Run, tokens: Sequence[int] = ()) -> bool:
    """Returns True if outputs with the adapter equal the base's bit for bit; False if no input can tell.

    tokens: ids whose rows the adapter changes; some of them end the input. Raises what the model raises with
    the adapter on but not off.
    """
    inputs = packed_default(model)
    if isinstance(inputs, str):
        return False
    for own in inputs.values():  # of encoder and decoder
        (ids,) = own["values"]
        own["values"] = [[*ids, *tokens[: len(ids)]][-len(ids) :]]
    try:
        off = run(inputs, False)
    except Exception:  # a model may need more than token ids
        return False
    return torch.equal(off, run(inputs, True))


def output_of(output: Any) -> Tensor:
    """Returns the logits of a model's output, or its first tensor. Raises ConfigError if it holds none."""
    inner = (
        output.values()
        if isinstance(output, Mapping)
        else output
        if isinstance(output, (tuple, list))
        else ()
    )
    for found in (getattr(output, "logits", None), output, *inner):
        if isinstance(found, Tensor):
            return found.float()
    kind = type(output).__name__
    raise ConfigError(f"probe: the model must return a tensor, or something with .logits, got a {kind}")


def _numbers(y: Tensor, where: list[int]) -> list[float]:
    return [float(f"{v:.9g}") for v in y.reshape(-1)[where].tolist()]


def _dtype(model: nn.Module) -> str:
    first = next((p.dtype for p in base_parameters(model).values() if p.is_floating_point()), torch.float32)
    return str(first).removeprefix("torch.")


def _precision(model: nn.Module) -> str:
    """Returns the dtype whose rounding the model's products have: TF32 and faster modes are not float32."""
    dtype = _dtype(model)
    if dtype != "float32":
        return dtype
    mode = torch.get_float32_matmul_precision()
    fast = next(iter(base_parameters(model).values())).is_cuda  # whose convolutions use TF32 by default
    return "bfloat16" if mode == "medium" else "float16" if mode == "high" or fast else "float32"


def _precision_of(dtype: str) -> str:
    """Returns the precision of a probe of an earlier version, which did not note the mode of its products."""
    return "float16" if dtype == "float32" else dtype


def _tolerance(dtype: str) -> float:
    return _of(TOLERANCE, dtype)


def _of(table: Mapping[str, T], dtype: str) -> T:
    return table.get(dtype, table["bfloat16"])
