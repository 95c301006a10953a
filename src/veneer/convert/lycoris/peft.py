"""LoHa and LoKr in PEFT's folder: base_model.model.<module>.hada_w1_a, and one setting of shapes for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer import files, methods
from veneer.adapt.peft.settings import CONFIG, PREFIX, TENSORS, table
from veneer.adapt.peft.targets import at
from veneer.convert.base import Base
from veneer.convert.dialects import peft
from veneer.convert.lycoris import layers as common
from veneer.convert.lycoris.layers import Layer, Layers
from veneer.errors import FormatError, first_few
from veneer.methods.lokr import split


def read(folder: Path, config: Mapping[str, Any]) -> Layers:
    """Returns the layers of a folder whose settings are `config`. Raises FormatError for other tensors."""
    method = config["peft_type"]
    modules: dict[str, dict[str, Tensor]] = {}
    odd = []
    for name, t in files.read_tensors(folder / TENSORS).items():
        module, _, end = name.removeprefix(PREFIX).rpartition(".")
        if end in common.TENSORS[method] and name.startswith(PREFIX):
            modules.setdefault(module, {})[end] = t
        else:
            odd.append(name)
    if odd:
        raise FormatError(f"{folder} holds other tensors than those of {method}: {first_few(odd)}")
    own = {n: at(dict(config), n) for n in modules}
    return Layers(method, {n: Layer(t, float(own[n]["alpha"]) / own[n]["r"]) for n, t in modules.items()})


def write(layers: Layers, folder: Path, base: Base) -> list[str]:
    """Writes the folder. Raises FormatError for shapes of LoKr that PEFT cannot have."""
    method = layers.method
    settings: dict[str, Any] = {} if method == "LOHA" else _shapes(layers)
    ranks = {n: float(layer.rank or 0) for n, layer in layers.sites.items()}
    if method == "LOKR":
        ranks = {n: float(_rank(layer)) for n, layer in layers.sites.items()}
    alphas = {n: layer.scaling * ranks[n] for n, layer in layers.sites.items()}
    config = {**table(methods.get(method.lower())).always, **settings, "peft_type": method}
    config["use_effective_conv2d"] = any(
        {"hada_t1", "lokr_t2"} & layer.tensors.keys() for layer in layers.sites.values()
    )
    config["target_modules"] = peft.targets_of(layers.sites, base.names)
    for key, values in (("r", ranks), ("alpha", alphas)):
        config[key], config[peft.PATTERNS[key]] = peft.pattern(key, values)
    named = {f"{PREFIX}{n}.{end}": t for n, layer in layers.sites.items() for end, t in layer.tensors.items()}
    with files.replacing(folder / TENSORS, folder / CONFIG) as (tensors, written):
        files.write_tensors(tensors, {n: t.contiguous() for n, t in named.items()})
        files.write_json(written, config)
    return []


class _Sides:
    """The sizes p, k, m, n of L (p, m) and R (k, n kernel), and which of both are products."""

    def __init__(self, layer: Layer) -> None:
        t = layer.tensors
        self.left, self.right = "lokr_w1_a" in t, "lokr_w2_a" in t
        self.p, self.m = (len(t["lokr_w1_a"]), t["lokr_w1_b"].shape[1]) if self.left else t["lokr_w1"].shape
        kernel = 1
        if "lokr_t2" in t:
            self.k, n = t["lokr_w2_a"].shape[1], t["lokr_w2_b"].shape[1]
        elif self.right:
            self.k, n = len(t["lokr_w2_a"]), t["lokr_w2_b"].shape[1]
        else:
            self.k, n = t["lokr_w2"].shape[:2]
            kernel = math.prod(t["lokr_w2"].shape[2:])
        self.n, self.kernel = n, kernel


def _rank(layer: Layer) -> int:
    """Returns the rank by which PEFT gives the layer's second matrix its form."""
    if layer.rank is not None:
        return layer.rank
    sides = _Sides(layer)
    return max(sides.k, sides.n)  # from half of it on, PEFT keeps the matrix whole


def _shapes(layers: Layers) -> dict[str, Any]:
    """Returns PEFT's decompose_factor and decompose_both for the layers' shapes."""
    every = {n: (_Sides(layer), _rank(layer)) for n, layer in layers.sites.items()}
    both = any(sides.left for sides, _ in every.values())
    factors = [-1, *sorted({sides.p for sides, _ in every.values()} | {s.m for s, _ in every.values()})]
    misfits: list[str] = []
    for factor in factors:
        odd = [n for n, (sides, rank) in every.items() if not _same(sides, rank, factor, both)]
        if not odd:
            return {"decompose_factor": factor, "decompose_both": both}
        misfits = odd if not misfits or len(odd) < len(misfits) else misfits
    raise FormatError(
        f"PEFT has one rule for the shapes of all layers, which these break: {first_few(misfits)};"
        f" merge the adapter with LyCORIS, and take the difference with veneer.extract"
    )


def _same(sides: _Sides, rank: int, factor: int, both: bool) -> bool:
    """Returns True if PEFT gives the layer these shapes; kernels of a second product are not told apart."""
    out = split(sides.p * sides.k, factor) == (sides.p, sides.k)
    widths = [sides.n] if not sides.right else [d for d in range(1, sides.n + 1) if sides.n % d == 0]
    in_ = any(split(sides.m * n, factor) == (sides.m, n) for n in widths)
    left = (both and rank < max(sides.p, sides.m) / 2) == sides.left
    right = any(rank < max(sides.k, n) / 2 for n in widths) == sides.right
    return out and in_ and left and right
