"""Groups trained parameters by role, with a rate and a weight decay each.

Weight decay means the same for every method: the change of the weights shrinks by (1 - rate * decay) per
step. A change that is a product of n trained factors shrinks as a whole: each factor takes the n-th root. For
B A that is the square root each, whatever ratio LoRA+ has between their rates. AdamW's own rule would decay
the product by (1 - rate * decay)(1 - ratio * rate * decay). Vectors (norms, biases, magnitudes) do not decay.
Neither do gains, for which one means no change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from string import digits
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.adapt.attached import changes
from veneer.errors import ConfigError
from veneer.methods import Delta
from veneer.sites.embedding import EmbeddingSite
from veneer.sites.finding.kinds import kind_of

FACTORS = ("A", "B")
UNDECAYED = ("gain", "direction")  # one, or any length, means no change
PRODUCT = (*FACTORS, "factor")  # roles whose parameters multiply to the change


class Part(NamedTuple):
    """One trained parameter.

    role: its role in the method without the number of its pair, else "matrix" or "vector"; pair: that number,
    "" for the first; embedding: True if it changes an embedding; owner: the change, or the change within a
    change, whose own parameter it is.
    """

    name: str
    parameter: nn.Parameter
    role: str
    embedding: bool = False
    owner: Delta | None = None
    pair: str = ""


def of_adapter(model: nn.Module, adapter: str) -> list[Part]:
    """Returns the trained parameters of one adapter, in the model's order, a shared one once.

    Raises ConfigError without any.
    """
    found: list[Part] = []
    for site, delta in changes(model, adapter):
        for name, p in delta.named_parameters():
            if any(p is other.parameter for other in found):  # rows of tokens of a tied head
                continue
            path, _, own = name.rpartition(".")
            inner = delta.get_submodule(path)
            given = delta.roles.get(own, _shape(p))
            role = given.rstrip(digits)
            owner = inner if isinstance(inner, Delta) else None
            embedding, pair = site.kind == "embedding", given.removeprefix(role)
            found.append(Part(f"{site.name}.{name}", p, role, embedding, owner, pair))
    return _trained(found)


def of_base(model: nn.Module) -> list[Part]:
    """Returns the trained parameters of the model itself, a tied one once. Raises ConfigError without any."""
    tables = {id(m.weight) for m in model.modules() if kind_of(m) is EmbeddingSite}
    return _trained(Part(n, p, _shape(p), id(p) in tables) for n, p in model.named_parameters())


def _shape(p: nn.Parameter) -> str:
    return "matrix" if p.ndim > 1 else "vector"


def _trained(parts: Iterable[Part]) -> list[Part]:
    found = [p for p in parts if p.parameter.requires_grad]
    if not sum(p.parameter.numel() for p in found):
        raise ConfigError(
            "nothing to train: no parameter requires a gradient; choose a method with parameters, or other"
            " layers"
        )
    return found


def decay_shares(parts: Sequence[Part]) -> list[float]:
    """Returns the exponents of weight decay: 1/n for one of n factors, 0 for vectors, gains and
    directions."""
    factors = Counter(id(p.owner) for p in parts if p.role in PRODUCT)
    return [
        1 / factors[id(p.owner)]
        if p.role in PRODUCT
        else float(p.parameter.ndim > 1 and p.role not in UNDECAYED)
        for p in parts
    ]


def adamw(
    parts: Iterable[Part],
    scales: Mapping[str, float],
    *,
    embedding: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """Returns AdamW with a group for every role; `set_rates` sets the rates before each step."""
    return torch.optim.AdamW(
        by_rate(parts, scales, embedding), lr=0.0, betas=betas, weight_decay=0.0, fused=True
    )


def by_rate(
    parts: Iterable[Part], scales: Mapping[str, float], embedding: float = 1.0
) -> list[dict[str, Any]]:
    """Returns groups as `set_rates` expects them, one per rate and decay.

    scales: multiples of the run's rate by role. embedding: the multiple for what changes embeddings, in place
    of these.
    """
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    parts = list(parts)
    for part, share in zip(parts, decay_shares(parts), strict=True):
        scale = embedding if part.embedding else scales.get(part.role, 1.0)
        base = embedding if part.embedding else 1.0
        groups.setdefault((scale, base, share), []).append(part.parameter)
    return [{"params": ps, "scale": s, "base": b, "share": h} for (s, b, h), ps in groups.items()]


def set_rates(optimiser: torch.optim.Optimizer, rate: float, decay: float) -> None:
    """Sets the rate of this step and the matching decay in every group.

    AdamW multiplies by (1 - lr * weight_decay); the weight_decay given to it makes that (1 - base * rate *
    decay)^share.
    """
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]
        kept = (1 - group["base"] * rate * decay) ** group["share"]
        group["weight_decay"] = (1 - kept) / group["lr"] if group["lr"] else 0.0
