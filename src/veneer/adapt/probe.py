"""The golden probe: a fixed input and some of the outputs with the adapter off and on, kept beside the
adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.attached import base_parameters
from veneer.adapt.modes import evaluating
from veneer.adapt.probe_inputs import Record, packed, packed_default, unpacked
from veneer.adapt.switch import using
from veneer.errors import ConfigError

PICKED = 48
Run = Callable[[Record, bool], Tensor]  # (packed inputs, with the adapter) -> outputs in float32

# Allowed error relative to the largest kept output: other kernels and other summation orders at that
# precision. float32 leaves room for TF32, which computes products with 10 bits.
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
    adapter's file if narrower than the adapter. replaced: random modules that the file replaces; outputs
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
    }


def check(model: nn.Module, run: Run, saved: Record) -> list[str]:
    """Returns the problems if `run` gives other outputs than those kept, else []."""
    off, on = (run(saved["inputs"], adapted) for adapted in (False, True))
    if list(off.shape) != saved["shape"]:
        there = tuple(saved["shape"])
        return [f"probe: the model's output is {tuple(off.shape)}, it was {there} when the adapter was saved"]
    relative = max(_tolerance(saved["dtype"]), _tolerance(_dtype(model)))
    problems = []
    compared = saved.get("compared", ("off", "on"))
    for state, y in ((s, y) for s, y in (("off", off), ("on", on)) if s in compared):
        then = torch.tensor(saved[state])
        error = float((torch.tensor(_numbers(y, saved["where"])) - then).abs().max())
        limit = relative * float(torch.tensor(saved["off"] + saved["on"]).abs().max())
        if not error <= limit:
            problems.append(
                f"probe: with the adapter {state}, outputs are {error:.2g} from those kept with it; "
                f"{limit:.2g} is allowed"
            )
    return problems


def is_idle(model: nn.Module, run: Run) -> bool:
    """Returns True if outputs with the adapter equal the base's bit for bit; False if no input can tell.

    Raises what the model raises with the adapter on but not off.
    """
    inputs = packed_default(model)
    if isinstance(inputs, str):
        return False
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


def _tolerance(dtype: str) -> float:
    return TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
