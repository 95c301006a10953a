"""OFT: W' = W R', R block diagonal and orthogonal, from skew-symmetric Q.  Qiu et al. 2023,
https://arxiv.org/abs/2306.07280

The input is cut into blocks of b numbers, and each block is rotated. R comes from Q by Cayley's transform: by
a Neumann series of `terms` (OFTv2, https://arxiv.org/abs/2506.19847), (I + Q) (I + Q + Q^2 + ..), or exactly,
(I - Q) (I + Q)^-1, for terms=0. As in PEFT the two turn in opposite directions, so a file is read with its
own value. A series with an even number of terms is far closer to a rotation than one with the next odd number
(PEFT's default is 5); it needs the norm of Q below 1.

Parameters: in (b - 1) / 2 a layer, or b (b - 1) / 2 with shared blocks.
State: the upper triangles of Q.
Cost: a product of the input with blocks of side b, forward and backward, in front of the layer; merged: none.
Use: to keep the angles between the weights of a layer, and with them more of the base's abilities. The
strength dial multiplies Q, which keeps R a rotation.
Against: it cannot be combined with other adapters at low rank. Beside others, and at strengths other than 1,
it costs another product with W.
"""

from __future__ import annotations

import math
import re
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, FormatError
from veneer.methods.base.checks import check_divides
from veneer.methods.base.delta import Delta, master_dtype
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_dims, check_peft_tensors
from veneer.methods.base.turning import Turning, turned_size
from veneer.ops.matrix import rotations
from veneer.sites import Site


@final
class OFT(Turning, PeftStored):
    """Q (n, b (b - 1) / 2), upper triangles row by row, starts at zero: no rotation."""

    peft_settings = {
        "r": 0,
        "oft_block_size": 32,
        "module_dropout": 0.0,
        "init_weights": True,
        "coft": False,
        "eps": 6e-5,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "fan_in_fan_out": False,
        "bias": "none",
    }

    def __init__(self, site: Site, *, block: int = 32, terms: int = 6, shared: bool = False) -> None:
        """
        block: b, the side of a rotated block; a divisor of `in` (of `out` for embeddings)
        terms: terms of the Neumann series, 2 or more; 0 for the exact transform
        shared: one rotation for all blocks
        """
        super().__init__()
        if terms < 0 or terms == 1:
            raise ConfigError(f"terms must be 0 or at least 2, got {terms}")
        if block < 2:
            raise ConfigError(f"block must be at least 2, got {block}")
        size = turned_size(site)
        check_divides("block", block, {"out" if site.kind == "embedding" else "in": size}, site)
        self.block, self.terms = block, terms
        shape = (1 if shared else size // block, block * (block - 1) // 2)
        self.Q = nn.Parameter(torch.zeros(shape, dtype=master_dtype(site), device=site.device))

    def rotations(self, strength: float = 1.0) -> Tensor:
        """Returns R - I (n, b, b) at this strength."""
        Q = rotations.skew(self.Q if strength == 1 else strength * self.Q, self.block)
        return rotations.cayley_series(Q, self.terms) if self.terms else rotations.cayley(Q)

    def turn(self, T: Tensor, strength: float, *, back: bool = False) -> Tensor:
        D = self.rotations(strength)
        return rotations.turn(T, (D.mT if back else D).to(T.dtype))

    def to_peft(self, site: Site) -> PeftForm | None:
        if site.kind not in ("linear", "embedding"):
            return None  # PEFT's forward of a convolution is not its merge, and Conv1D it refuses
        config = {
            "peft_type": "OFT",
            "oft_block_size": self.block,
            "block_share": len(self.Q) == 1 and turned_size(site) > self.block,
            "use_cayley_neumann": bool(self.terms),
            "num_cayley_neumann_terms": self.terms or 5,
            "peft_version": "0.18.0",  # the first whose series this is; PEFT warns without it
        }
        return PeftForm(config, {_peft_name(site): self.Q.detach()})

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "OFT"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        name, size = _peft_name(site), turned_size(site)
        if site.kind == "conv":
            raise FormatError(f"{site.name}: PEFT's OFT of a convolution is not a change of its weight")
        if config["use_cayley_neumann"] and _version(config["peft_version"]) < (0, 18):
            raise FormatError(
                f"{site.name}: PEFT before 0.18 summed another series for use_cayley_neumann;"
                f" merge the adapter with the PEFT that trained it"
            )
        check_peft_dims(site, tensors, {name: 2})
        n, numbers = tensors[name].shape
        block = math.isqrt(2 * numbers) + 1 if config["block_share"] else size // n
        terms = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else 0
        delta = build(cls, site, {"block": block, "terms": terms, "shared": bool(config["block_share"])})
        Q = delta.get_parameter("Q")
        check_peft_tensors(site, tensors, {name: tuple(Q.shape)})
        with torch.no_grad():
            Q.copy_(tensors[name])
            if config["coft"]:  # PEFT shortens Q in every forward, evaluation included
                norms = math.sqrt(2) * Q.norm(dim=1, keepdim=True)
                Q.mul_((config["eps"] / math.sqrt(n) / norms).clamp_max(1))
        return delta


def _version(text: str | None) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", text or "")
    return tuple(map(int, found.groups())) if found else ()


def _peft_name(site: Site) -> str:
    return "oft_embedding_R.weight" if site.kind == "embedding" else "oft_R.weight"
