"""Identifies a base by a sample of every weight, rounded so that fp32, bf16 and fp16 copies look the same.

A sample is 4096 numbers spread over a parameter, so that 7 billion take a second; a change that misses all of
them (a few rows of an embedding) is not seen. Buffers (BatchNorm's running means) are left out: training
moves them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer.adapt.attached import base_parameters
from veneer.errors import first_few
from veneer.sites import changed
from veneer.sites.quantised import plain

HASHED, KEPT = 4096, 32
SPREAD = 2_654_435_761  # a prime near 2^32 / golden ratio
Record = dict[str, Any]
_known: WeakKeyDictionary[nn.Module, dict[str, Record]] = WeakKeyDictionary()  # by the state it had


def measure(model: nn.Module) -> Record:
    """Returns the fingerprint of the model without its adapters: one SHA-256 of all, and one of each
    parameter.

    It is computed once for a model and again only after its parameters were replaced or written to.
    """
    state = _state(model)
    known = _known.get(model, {})
    if state not in known:
        known = _known[model] = {state: _measured(model)}
    return copy.deepcopy(known[state])


def _state(model: nn.Module) -> str:
    """Returns a digest that changes with the parameters, at a hundredth of the fingerprint's cost.

    A write through `.data` leaves no trace in a tensor's version, so a few numbers of each parameter are part
    of it.
    """
    digest = hashlib.sha256(repr(changed.forms_of(model)).encode())
    for name, p in base_parameters(model).items():
        version = None if p.is_inference() else p._version
        where = None if p.is_meta else p.data_ptr()
        digest.update(f"{name} {id(p)} {where} {tuple(p.shape)} {p.dtype} {version} ".encode())
        if not p.is_meta:  # a block on disk is never written to
            digest.update(_bytes(_sample(plain(p.detach()), KEPT)))
    return digest.hexdigest()


def _measured(model: nn.Module) -> Record:
    # By attribute, which reads the blocks of a base on disk one by one.
    tensors = {name: _of(name, plain(model.get_parameter(name).detach())) for name in base_parameters(model)}
    return {"sha256": _digest(tensors), "tensors": tensors, **changed.forms_of(model)}


def without(record: Record, modules: Iterable[str]) -> Record:
    """Returns the fingerprint without the parameters of these modules, which a file replaces whole."""
    gone = sorted(modules)
    if not gone:
        return record
    tensors = {n: t for n, t in record["tensors"].items() if not any(n.startswith(f"{m}.") for m in gone)}
    return {**record, "sha256": _digest(tensors), "tensors": tensors, "replaced": gone}


def _digest(tensors: Mapping[str, Record]) -> str:
    whole = "".join(f"{n} {t['sha256']}\n" for n, t in sorted(tensors.items()))
    return hashlib.sha256(whole.encode()).hexdigest()


def _of(name: str, p: Tensor) -> Record:
    rounded = _sample(p, HASHED)
    if rounded.is_floating_point():
        rounded = rounded.to(torch.bfloat16)
    seen = hashlib.sha256(f"{name} {tuple(p.shape)} ".encode() + _bytes(rounded))
    kept = [
        float(f"{v:.9g}") for v in _sample(p, KEPT).float().nan_to_num(0.0).tolist()
    ]  # 9 digits hold a float32
    return {
        "shape": list(p.shape),
        "dtype": str(p.dtype).removeprefix("torch."),
        "sha256": seen.hexdigest()[:32],
        "sample": kept,
    }


def _bytes(t: Tensor) -> bytes:
    return t.cpu().contiguous().view(torch.uint8).numpy().tobytes()  # numpy has no bfloat16


def _sample(p: Tensor, most: int) -> Tensor:
    flat = p.reshape(-1)
    n = min(most, flat.numel())
    if n == flat.numel():
        return flat
    # Spread by the golden ratio: an even stride would meet the same few columns of a matrix again and again.
    return flat[torch.arange(n, device=flat.device) * SPREAD % flat.numel()]


def differences(model: nn.Module, saved: Record) -> list[str]:
    """Returns a line per kind of difference between `model` and the base measured as `saved`; [] if none."""
    now = without(measure(model), saved.get("replaced", ()))
    there_as, here_as = changed.recorded(saved), changed.recorded(now)
    if there_as != here_as:
        return [
            f"another base: the adapter's is {changed.in_words(there_as)}, this model is "
            f"{changed.in_words(here_as)};"
            f" {'open it as it was then' if here_as else changed.advice(there_as)}"
        ]
    if now["sha256"] == saved["sha256"]:
        return []
    here, there = now["tensors"], saved["tensors"]
    both = [n for n in here if n in there]
    shapes = [
        f"{n} {tuple(there[n]['shape'])} -> {tuple(here[n]['shape'])}"
        for n in both
        if there[n]["shape"] != here[n]["shape"]
    ]
    values = [n for n in both if there[n]["shape"] == here[n]["shape"] and not _same(there[n], here[n])]
    kinds = {
        f"{len(values)} of {len(there)} weights have other values": values,
        "weights have other shapes": shapes,
        "weights are not in this model": [n for n in there if n not in here],
        "weights were not in the adapter's base": [n for n in here if n not in there],
    }
    return [f"another base: {what}: {first_few(names)}" for what, names in kinds.items() if names]


def _same(a: Record, b: Record) -> bool:
    """Returns True if two samples are equal but for rounding.

    Only float16 needs a tolerance: float32 -> float16 -> bfloat16 rounds twice.
    """
    if a["sha256"] == b["sha256"]:
        return True
    dtypes = [getattr(torch, t["dtype"]) for t in (a, b)]
    if torch.float16 not in dtypes or not all(d.is_floating_point for d in dtypes):
        return False
    relative = float(sum(torch.finfo(d).eps / 2 for d in dtypes))
    least = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    pairs = zip(a["sample"], b["sample"], strict=True)
    return all(bool(abs(x - y) <= relative * max(abs(x), abs(y)) + least) for x, y in pairs)
