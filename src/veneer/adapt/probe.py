"""The golden probe: a fixed input and a few of the outputs with the adapter off and on, kept beside the adapter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.attach import using
from veneer.adapt.attached import base_parameters
from veneer.adapt.problems import Problem
from veneer.errors import ConfigError

Record = dict[str, Any]
TOKENS, PICKED, LARGEST = 16, 48, 1 << 16

# Allowed error relative to the largest of the kept outputs: other kernels and other summation orders at that precision.
# float32 leaves room for TF32, which computes products with 10 bits.
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def take(
    model: nn.Module, name: str, inputs: Mapping[str, Any] | None = None, kept_in: torch.dtype | None = None
) -> Record | str:
    """The probe of adapter `name` on `inputs`, keyword arguments of the model; or why there is none.

    Without `inputs` language models and classifiers of tokens get a fixed sequence. kept_in: the dtype of the adapter's
    file, where it is narrower than the adapter. Raises ConfigError for inputs that cannot be kept.
    """
    if inputs is None:
        default = _token_ids(model)
        if isinstance(default, str):
            return default
        packed = default
    else:
        packed = {n: _pack(n, v) for n, v in inputs.items()}
    try:
        off, on = outputs(model, name, packed)
    except Exception as e:
        if inputs is not None:
            raise
        return f"the model fails on bare token ids ({type(e).__name__}); pass probe= with the keyword arguments of a call"
    if not (torch.isfinite(off).all() and torch.isfinite(on).all()):
        return "the outputs are not finite"
    where = list(range(0, off.numel(), max(1, off.numel() // PICKED)))[:PICKED]
    dtypes = [_dtype(model)] + ([str(kept_in).removeprefix("torch.")] if kept_in else [])
    return {
        "inputs": packed,
        "shape": list(off.shape),
        "where": where,
        "off": _numbers(off, where),
        "on": _numbers(on, where),
        "dtype": max(dtypes, key=_tolerance),
    }


def default_inputs(model: nn.Module) -> dict[str, Any] | None:
    """The fixed sequence of a model that takes token ids, as keyword arguments of a call; None for other models."""
    packed = _token_ids(model)
    return None if isinstance(packed, str) else {n: _unpack(model, v) for n, v in packed.items()}


def check(model: nn.Module, name: str, saved: Record) -> list[str]:
    """What the probe says against adapter `name`, attached to `model`; empty if it acts as it did when it was saved."""
    off, on = outputs(model, name, saved["inputs"])
    if list(off.shape) != saved["shape"]:
        return [
            f"probe: the model's output is {tuple(off.shape)}, it was {tuple(saved['shape'])} when the adapter was saved"
        ]
    relative = max(_tolerance(saved["dtype"]), _tolerance(_dtype(model)))
    problems = []
    for state, y in (("off", off), ("on", on)):
        then = torch.tensor(saved[state])
        error = float((torch.tensor(_numbers(y, saved["where"])) - then).abs().max())
        limit = relative * float(torch.tensor(saved["off"] + saved["on"]).abs().max())
        if not error <= limit:
            problems.append(
                f"probe: with the adapter {state}, outputs are {error:.2g} from those kept with it; {limit:.2g} is allowed"
            )
    return problems


def idle(model: nn.Module, name: str) -> list[Problem]:
    """A problem if the model's outputs with adapter `name` are those without it; none where there is no input to try."""
    packed = _token_ids(model)
    try:
        same = isinstance(packed, dict) and torch.equal(*outputs(model, name, packed))
    except Exception:  # a model may need more than token ids, and then says so in its own way
        return []
    text = "the model's outputs with it are those of the base, bit for bit; does the model call these layers?"
    return [Problem("zero", text)] if same else []


@torch.no_grad()
def outputs(model: nn.Module, name: str, packed: Record) -> tuple[Tensor, Tensor]:
    """The model's outputs with no adapter, and with `name` alone, in evaluation mode."""
    inputs = {n: _unpack(model, v) for n, v in packed.items()}
    with evaluating(model):
        with using(model):
            off = _tensor(model(**inputs))
        with using(model, name):
            on = _tensor(model(**inputs))
    return off, on


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block every module is in eval mode; each gets its own mode back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _token_ids(model: nn.Module) -> Record | str:
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or "input_ids" not in inspect.signature(model.forward).parameters:
        return "the model does not take token ids; pass probe= with the keyword arguments of a call"
    length = min(TOKENS, int(getattr(config, "max_position_embeddings", None) or TOKENS))
    ids = _pack("input_ids", torch.tensor([[(1 + 7919 * i) % vocabulary for i in range(length)]]))
    return {
        "input_ids": ids,
        **({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}),
    }


def _tensor(output: Any) -> Tensor:
    """The logits of an output, or its first tensor."""
    for found in (
        getattr(output, "logits", None),
        output,
        *(output.values() if isinstance(output, Mapping) else ()),
    ):
        if isinstance(found, Tensor):
            return found.float()
    first = output[0] if isinstance(output, (tuple, list)) and output else None
    if not isinstance(first, Tensor):
        raise ConfigError(
            f"the probe needs a model that returns a tensor, or something with .logits, not {type(output).__name__}"
        )
    return first.float()


def _numbers(y: Tensor, where: list[int]) -> list[float]:
    return [float(f"{v:.9g}") for v in y.reshape(-1)[where].tolist()]


def _dtype(model: nn.Module) -> str:
    return str(
        next((p.dtype for p in base_parameters(model).values() if p.is_floating_point()), torch.float32)
    ).removeprefix("torch.")


def _tolerance(dtype: str) -> float:
    return TOLERANCE.get(dtype, TOLERANCE["bfloat16"])


def _pack(name: str, value: Any) -> Any:
    """An input as JSON: tensors as their dtype and numbers, plain values as they are."""
    if isinstance(value, Tensor):
        if value.numel() > LARGEST or value.is_complex():
            raise ConfigError(
                f"probe input {name!r} holds {value.numel()} numbers; give a smaller one, of at most {LARGEST} real numbers"
            )
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"probe input {name!r} is a {type(value).__name__}; give a tensor, a number, a text or None"
    )


def _unpack(model: nn.Module, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    like = next(iter(base_parameters(model).values()))
    x = torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]), device=like.device)
    return x.to(_float_dtype(like)) if x.is_floating_point() else x


def _float_dtype(like: Tensor) -> torch.dtype:
    return like.dtype if like.is_floating_point() else torch.float32
