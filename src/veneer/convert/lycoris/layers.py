"""The common form of LoHa and LoKr: their tensors by the name of the module, which PEFT and LyCORIS share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from veneer.errors import FormatError, first_few

# PEFT's type of each method, and its tensors.
TENSORS = {
    "LOHA": {f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "LOKR": {f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
RIGHT = re.compile(r"lokr_w2|lokr_w2_a lokr_w2_b|lokr_t2 lokr_w2_a lokr_w2_b")
LEFT = re.compile(r"lokr_w1|lokr_w1_a lokr_w1_b")
LOHA = re.compile(r"(hada_t1 hada_t2 )?hada_w1_a hada_w1_b hada_w2_a hada_w2_b")


@dataclass(frozen=True)
class Layer:
    """W' = W + scaling * (w1_a w1_b) o (w2_a w2_b), or scaling * kron(w1, w2).

    tensors: by their names in both programs. With a core t of a convolution w_a is (r, out).
    """

    tensors: dict[str, Tensor]
    scaling: float

    @property
    def rank(self) -> int | None:
        """The rank of the products, or None for LoKr of two whole matrices."""
        found = next(
            (self.tensors[n] for n in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if n in self.tensors), None
        )
        return None if found is None else len(found)


@dataclass(frozen=True)
class Layers:
    """An adapter of one method. method: LOHA or LOKR."""

    method: str
    sites: Mapping[str, Layer]

    def __post_init__(self) -> None:
        wrong = [
            f"{n}: {', '.join(sorted(s.tensors))}"
            for n, s in self.sites.items()
            if not _whole(self.method, s)
        ]
        if wrong:
            raise FormatError(f"incomplete tensors of {self.method}: {first_few(wrong)}")
        if not self.sites:
            raise FormatError(f"the adapter must hold at least one layer of {self.method}, got none")


def method_of(names: set[str]) -> str | None:
    """Returns the method that has tensors of these names, or None."""
    return next((method for method, own in TENSORS.items() if names & own), None)


def _whole(method: str, layer: Layer) -> bool:
    names = sorted(layer.tensors)
    if method == "LOHA":
        return LOHA.fullmatch(" ".join(names)) is not None
    left, right = (" ".join(n for n in names if ("w1" in n) == is_left) for is_left in (True, False))
    return LEFT.fullmatch(left) is not None and RIGHT.fullmatch(right) is not None
