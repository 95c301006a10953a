"""Reads PEFT's starts that move the base to W - s B0 A0, as factors on the untouched base.

PEFT stores only the trained A and B and moves the base again when it opens the folder. On the untouched base
the change is s (B A - B0 A0) = s ((B - B0) A + B0 (A - A0)): the factors [A; A - A0] and [B - B0, B0] at the
same scaling.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from veneer.errors import FormatError
from veneer.sites import Site

# Starts that leave the base alone: their folders are plain LoRA.
PLAIN = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Starts that the base alone determines.
EXACT = ("pissa", "olora")
# Starts that only the folder of the untrained adapter tells.
FROM_FOLDER = ("pissa_niter", "corda", "lora_ga")

CONVERT = (
    "convert it with PEFT: before training, set model.peft_config['default'].init_lora_weights = True and"
    " model.save_pretrained('initial'); after it, model.save_pretrained(out, "
    "path_initial_model_for_weight_conversion='initial')"
)
NEVER = {
    "loftq": "it replaces the base by a quantised copy, which no low-rank change of the base expresses",
    "kasa": "it cuts the smallest singular values off the base, for which its folder keeps no factors",
}


def problem(start: Any, has_initial: bool) -> str | None:
    """Returns the reason why this init_lora_weights cannot be read and the way out, or None if it can."""
    name = start.lower() if isinstance(start, str) else start
    family = _family(name)
    if has_initial and name in PLAIN:
        return (
            f"initial= is for starts that move the base; this adapter's init_lora_weights is {start!r}, "
            "which does not: leave it out"
        )
    if name in PLAIN or name in EXACT or (has_initial and family):
        return None
    if name in NEVER:
        return f"init_lora_weights {start!r}: {NEVER[name]}; merge it in PEFT and keep the merged model"
    if family is None:
        return f"init_lora_weights {start!r} is not known here; {CONVERT}"
    why = {
        "pissa_niter": (
            "its randomised SVD is not seeded, so that the base it was trained on cannot be rebuilt from "
            "this folder"
        ),
        "corda": "it moves the base by a decomposition over calibration data that the folder does not hold",
        "lora_ga": "it moves the base by a decomposition of gradients that the folder does not hold",
    }[family]
    return (
        f"init_lora_weights {start!r}: {why}. Pass initial= with the folder saved before training, or "
        f"{CONVERT}"
    )


def _family(name: Any) -> str | None:
    if not isinstance(name, str):
        return None
    return next(
        (f for f in FROM_FOLDER if name == f or name.startswith(f"{f}_")), name if name in EXACT else None
    )


def with_start(
    site: Site, config: dict[str, Any], tensors: dict[str, Tensor], initial: dict[str, Tensor] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the site's settings and tensors on the untouched base.

    initial: PEFT's tensors of the site before training, for starts that the base does not determine. Raises
    FormatError for a convolution, on which PEFT has no such start, and for an initial folder that does not
    fit.
    """
    start = str(config.get("init_lora_weights")).lower()
    if (start not in EXACT and initial is None) or site.kind == "embedding":  # PEFT starts embeddings plainly
        return config, tensors
    names = ("lora_A.weight", "lora_B.weight")
    r = config["r"]
    root = math.sqrt if config.get("use_rslora") else float
    s = config["lora_alpha"] / root(r)
    if initial is not None:
        A0, B0 = _given(site, initial, tensors, names)
        if not (A0.any() and B0.any()):
            return config, tensors
    if site.kind == "conv":
        raise FormatError(
            f"{site.name}: PEFT has no start {start!r} for convolutions; its settings and tensors disagree"
        )
    if initial is None:
        A0, B0 = (pissa if start == "pissa" else olora)(site, r, s)
    if any(n not in tensors or tensors[n].shape != t.shape for n, t in zip(names, (A0, B0), strict=True)):
        return config, tensors  # the site's own reader says what is wrong with them
    A, B = (tensors[n].to(torch.promote_types(tensors[n].dtype, torch.float32)) for n in names)
    joined = {names[0]: torch.cat([A, A - A0.to(A)]), names[1]: torch.cat([B - B0.to(B), B0.to(B)], 1)}
    return {**config, "r": 2 * r, "lora_alpha": s * root(2 * r), "start_rank": r}, {**tensors, **joined}


def _given(
    site: Site, initial: dict[str, Tensor], tensors: dict[str, Tensor], names: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    for n in names:
        if n not in initial:
            raise FormatError(f"missing in the initial folder: {site.name}.{n}")
        if n in tensors and tensors[n].shape != initial[n].shape:
            first, then = tuple(initial[n].shape), tuple(tensors[n].shape)
            raise FormatError(
                f"wrong shape: {site.name}.{n} is {first} in the initial folder, {then} in the trained one"
            )
    return initial[names[0]], initial[names[1]]


def pissa(site: Site, r: int, s: float) -> tuple[Tensor, Tensor]:
    """Returns A0 (r, in), B0 (out, r), s B0 A0 the leading part of W, by PEFT's exact SVD in float32."""
    U, S, Vh = torch.linalg.svd(site.weight().detach().float(), full_matrices=False)
    root = (S[:r] / s).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def olora(site: Site, r: int, s: float) -> tuple[Tensor, Tensor]:
    """Returns A0 = R[:r] (r, in), B0 = Q[:, :r] (out, r) of the stored weight's QR; PEFT subtracts s Q R.

    PEFT decomposes a Conv1D's weight as stored, (in, out): there the start is the transposed product.
    """
    W = site.weight().detach().float()
    stored = W.mT if site.kind == "transposed" else W
    Q, R = torch.linalg.qr(stored)
    A0, B0 = R[:r], Q[:, :r]
    return (B0.mT, A0.mT) if site.kind == "transposed" else (A0, B0)
