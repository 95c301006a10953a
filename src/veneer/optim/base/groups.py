"""What is trained, by the role it plays: rates and weight decay of every parameter group.

Weight decay means the same for every method: what a parameter group does to the weights shrinks by (1 - rate
* decay) a step. A and B each take the square root of that, so that B A decays by it as a whole, whatever
ratio LoRA+ has between their rates; AdamW's own rule would decay the product by (1 - rate * decay)(1 - ratio
* rate * decay). Vectors (norms, biases, magnitudes) do not decay, and neither do gains, which stand for no
change at one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.adapt.attached import changes
from veneer.errors import ConfigError
from veneer.methods import Delta
from veneer.sites.embedding import EmbeddingSite
from veneer.sites.find import kind_of

FACTORS = ("A", "B")


class Part(NamedTuple):
    """One trained parameter. role: what its method calls it, else "matrix" or "vector"; whether it changes an
    embedding.

    owner: the change, or the change within a change, that has it as its own.
    """

    name: str
    parameter: nn.Parameter
    role: str
    embedding: bool = False
    owner: Delta | None = None


def of_adapter(model: nn.Module, adapter: str) -> list[Part]:
    """The trained parameters of one adapter, in the model's order. Raises ConfigError if there are none."""
    found = []
    for site, delta in changes(model, adapter):
        for name, p in delta.named_parameters():
            path, _, own = name.rpartition(".")
            owner = delta.get_submodule(path)
            role = delta.roles.get(own, _shape(p))
            found.append(
                Part(
                    f"{site.name}.{name}",
                    p,
                    role,
                    site.kind == "embedding",
                    owner if isinstance(owner, Delta) else None,
                )
            )
    return _trained(found)


def of_base(model: nn.Module) -> list[Part]:
    """The trained parameters of the model itself; a tied one once. Raises ConfigError if there are none."""
    tables = {
        id(p) for m in model.modules() if kind_of(m) is EmbeddingSite for p in m.parameters(recurse=False)
    }
    return _trained(Part(n, p, _shape(p), id(p) in tables) for n, p in model.named_parameters())


def _shape(p: nn.Parameter) -> str:
    return "matrix" if p.ndim > 1 else "vector"


def _trained(parts: Iterable[Part]) -> list[Part]:
    found = [p for p in parts if p.parameter.requires_grad]
    if not sum(p.parameter.numel() for p in found):
        raise ConfigError(
            "nothing would be trained: no parameter takes a gradient; choose a method with parameters, or"
            " other layers"
        )
    return found


def adamw(
    parts: Iterable[Part],
    scales: Mapping[str, float],
    *,
    embedding: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW with a group for every role; rates are set before each step by `set_rates`."""
    return torch.optim.AdamW(
        by_rate(parts, scales, embedding), lr=0.0, betas=betas, weight_decay=0.0, fused=True
    )


def by_rate(
    parts: Iterable[Part], scales: Mapping[str, float], embedding: float = 1.0
) -> list[dict[str, Any]]:
    """Groups as `set_rates` knows them, one for every rate and decay.

    scales: multiples of the run's rate by role. embedding: the multiple for what changes embeddings, in place
    of these.
    """
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for part in parts:
        scale = embedding if part.embedding else scales.get(part.role, 1.0)
        base = embedding if part.embedding else 1.0
        share = 0.5 if part.role in FACTORS else float(part.parameter.ndim > 1 and part.role != "gain")
        groups.setdefault((scale, base, share), []).append(part.parameter)
    return [{"params": ps, "scale": s, "base": b, "share": h} for (s, b, h), ps in groups.items()]


def set_rates(optimiser: torch.optim.Optimizer, rate: float, decay: float) -> None:
    """The rate of this step and the decay that goes with it, in every group.

    AdamW multiplies by (1 - lr * weight_decay); the weight_decay given to it makes that (1 - base * rate *
    decay)^share.
    """
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]
        kept = (1 - group["base"] * rate * decay) ** group["share"]
        group["weight_decay"] = (1 - kept) / group["lr"] if group["lr"] else 0.0
