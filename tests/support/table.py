"""The table of methods and the table of sites: the only file of the tests that a new method edits.

Every property in test_methods.py runs on every cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from oracles import (
    adalora,
    dense,
    dora,
    flora,
    fourierft,
    frozen,
    hira,
    hra,
    ia3,
    loha,
    lokr,
    lora,
    miss,
    oft,
    randlora,
    shira,
    starts,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.sites import Site
from veneer.sites.factored.layers import holding


class Method(NamedTuple):
    """A method with options, and the closed form (W, tensors, options) -> W' that it must equal."""

    name: str
    options: dict[str, Any]
    oracle: Callable[..., Any]
    exact_gradient: bool = True  # False where the paper holds a part constant in the backward
    calibrated: bool = False  # True for a start that looks at the loss first
    fit: Callable[[dict[str, Any], Site], dict[str, Any]] | None = None  # makes the options fit a layer
    dial: Callable[[dict[str, Any], float], dict[str, Any]] | None = (
        None  # tensors at a strength, if not linear
    )
    start: float = 0.0  # the largest difference from the base at the start


class Place(NamedTuple):
    """A layer, and inputs for it."""

    layer: Callable[[], nn.Module]
    x: Callable[[], Tensor]


def blocks(*factors: int) -> Callable[[dict[str, Any], Site], dict[str, Any]]:
    """Returns a fit: the largest block up to the option's that divides the turned side, and fewer factors if
    needed."""

    def fit(options: dict[str, Any], site: Site) -> dict[str, Any]:
        turns_outputs = site.kind == "embedding"
        size = site.out if turns_outputs else site.in_
        found = {**options, "turns outputs": turns_outputs}
        for m in factors or (1,):
            fitting = [b for b in range(2, options["block"] + 1) if size % (b * 2 ** (m - 1)) == 0]
            fitting = [b for b in fitting if m == 1 or b % 2 == 0]
            if fitting:
                return {**found, "block": fitting[-1], **({"factors": m} if factors else {})}
        return {**found, "block": size, **({"factors": 1} if factors else {})}

    return fit


def of_generator(t: dict[str, Any], strength: float) -> dict[str, Any]:
    """The tensors of a rotation at a strength: the generator is multiplied, gains are drawn to one."""
    return {n: 1 + strength * (v - 1) if n == "s" else strength * v for n, v in t.items()}


METHODS = {
    "lora": Method("lora", {"rank": 3}, lora.weight),
    "lora alpha": Method("lora", {"rank": 2, "alpha": 5.0, "init": "gaussian"}, lora.weight),
    "rslora": Method("lora", {"rank": 3, "stabilised": True}, lora.weight),
    "pissa": Method("lora", {"rank": 2, "init": "pissa"}, lora.weight_from_pissa),
    "pissa alpha": Method("lora", {"rank": 2, "alpha": 7.0, "init": "pissa"}, lora.weight_from_pissa),
    "olora": Method("lora", {"rank": 2, "init": "olora", "alpha": 3.0}, lora.weight_from_olora),
    "orthogonal": Method("lora", {"rank": 2, "init": "orthogonal"}, lora.weight),
    "loraga": Method("lora", {"rank": 2, "init": "loraga"}, starts.weight_from_kept, calibrated=True),
    "gora": Method(  # whose start is a step away from the base
        "lora", {"rank": 2, "init": "gora", "alpha": 4.0}, lora.weight, calibrated=True, start=math.inf
    ),
    "keeplora": Method("lorafa", {"rank": 2, "init": "keeplora"}, lora.weight, calibrated=True),
    "miss": Method("miss", {"rank": 3}, miss.weight),
    "miss mini": Method("miss", {"rank": 2, "mini": 1}, miss.weight),
    "bat": Method("bat", {"rank": 1}, miss.weight_from_bat),
    "fourierft": Method("fourierft", {"frequencies": 10, "scaling": 50.0}, fourierft.weight),
    "fourierft rms": Method("fourierft", {"frequencies": 30, "rms": 0.3, "seed": 1}, fourierft.weight),
    "fourierft grid": Method("fourierft", {"frequencies": 6, "grid": True, "rms": 0.5}, fourierft.weight),
    "loldu": Method("loldu", {"rank": 3, "alpha": 2.0}, frozen.loldu),
    "loldu svd": Method("loldu", {"rank": 2, "basis": "svd"}, frozen.loldu),
    "loraxs": Method("loraxs", {"rank": 2, "alpha": 3.0}, frozen.loraxs),
    "vera": Method("vera", {"rank": 4}, frozen.vera),
    "flora": Method("flora", {}, flora.weight),
    "flora of rank 3": Method("flora", {"rank": 3}, flora.weight),
    "ia3": Method("ia3", {"feedforward": ("0",)}, ia3.weight),
    "oft": Method("oft", {"block": 3}, oft.weight, fit=blocks(), dial=of_generator),
    "oft series of 4": Method("oft", {"block": 6, "terms": 4}, oft.weight, fit=blocks(), dial=of_generator),
    "oft exact": Method("oft", {"block": 4, "terms": 0}, oft.weight, fit=blocks(), dial=of_generator),
    "oft shared": Method("oft", {"block": 3, "shared": True}, oft.weight, fit=blocks(), dial=of_generator),
    "boft": Method("boft", {"block": 4}, oft.butterfly, fit=blocks(1), dial=of_generator),
    "boft of 2 factors": Method("boft", {"block": 4}, oft.butterfly, fit=blocks(2, 1), dial=of_generator),
    "lokr": Method("lokr", {"rank": 1, "alpha": 3.0}, lokr.weight),
    "lokr whole": Method("lokr", {"rank": 3}, lokr.weight),
    "lokr of two products": Method("lokr", {"rank": 1, "both": True, "factor": 6}, lokr.weight),
    "hra": Method("hra", {"rank": 2}, hra.weight, start=1e-14),
    "hra of rank 4": Method("hra", {"rank": 4}, hra.weight, start=1e-14),
    "hira": Method("hira", {"rank": 3}, hira.weight),
    "shira": Method("shira", {"rank": 2}, shira.weight),
    "shira of 7 numbers": Method("shira", {"numbers": 7}, shira.weight),
    "adalora": Method("adalora", {"rank": 3, "target": 1}, adalora.weight),
    "dense": Method("dense", {}, dense.weight),
    "randlora": Method("randlora", {"rank": 2, "alpha": 3.0}, randlora.weight),
    "randlora alpha": Method("randlora", {"rank": 3, "alpha": 4.0, "seed": 1}, randlora.weight),
    "lorafa": Method("lorafa", {"rank": 3}, lora.weight),
    "lorafa pissa": Method("lorafa", {"rank": 2, "init": "pissa", "alpha": 5.0}, lora.weight),
    "loha": Method("loha", {"rank": 1, "alpha": 3.0}, loha.weight),
    "loha of rank 3": Method("loha", {"rank": 3}, loha.weight),
    "dora": Method("dora", {"rank": 3}, dora.weight, exact_gradient=False),
}


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _tokens(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape)


def _factored(form: str) -> nn.Module:
    """A layer (5, 7) of rank 3."""
    return holding(form, torch.randn(3, 7), torch.randn(5, 3), torch.randn(5))


SITES = {
    "linear": Place(lambda: nn.Linear(7, 5), lambda: _numbers(2, 4, 7)),
    "linear without bias": Place(lambda: nn.Linear(7, 5, bias=False), lambda: _numbers(3, 7)),
    "factored": Place(lambda: _factored("plain"), lambda: _numbers(2, 4, 7)),
    "factored, pivoted": Place(lambda: _factored("pivoted"), lambda: _numbers(3, 7)),
    "Conv1D": Place(lambda: Conv1D(5, 7), lambda: _numbers(2, 4, 7)),
    "embedding": Place(lambda: nn.Embedding(11, 6), lambda: _tokens(2, 4)),
    "embedding with padding": Place(lambda: nn.Embedding(11, 6, padding_idx=0), lambda: _tokens(2, 9)),
    "conv1d": Place(lambda: nn.Conv1d(4, 5, 3, stride=2, padding=1), lambda: _numbers(2, 4, 9)),
    "conv2d": Place(lambda: nn.Conv2d(4, 6, 3), lambda: _numbers(2, 4, 7, 7)),
    "conv2d dilated": Place(lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2), lambda: _numbers(2, 4, 8, 8)),
    "conv2d strided": Place(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
        lambda: _numbers(2, 4, 8, 8),
    ),
    "conv2d grouped": Place(lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: _numbers(2, 4, 7, 7)),
    "conv2d depthwise": Place(lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), lambda: _numbers(2, 4, 5, 5)),
    "conv2d same": Place(lambda: nn.Conv2d(4, 6, 4, padding="same"), lambda: _numbers(2, 4, 8, 8)),
    "conv2d reflect": Place(
        lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), lambda: _numbers(2, 4, 7, 7)
    ),
    "conv2d replicate": Place(
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), lambda: _numbers(2, 4, 7, 7)
    ),
    "conv1d circular": Place(
        lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), lambda: _numbers(2, 4, 8)
    ),
}
