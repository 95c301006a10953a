"""AdaLoRA: W' = W + s B diag(e) A; training removes the least important triplets.  Zhang et al. 2023,
https://arxiv.org/abs/2303.10512

A row of A, a number e and a column of B are a triplet. Its importance is that of e plus the means of its row
and its column. The importance of a number w is a smoothed |w dL/dw| times its smoothed deviation.
The number of triplets falls from `rank` to `target` a layer along a cubic curve; the layers compete for
them. A removed triplet is cut out of the parameters and the optimiser's state, so computation and memory
shrink; in the paper and in PEFT it is masked and may come back. `veneer fit` removes by itself; other loops
call `veneer.train.allocation.hold`.

Parameters: r (in + out + 1) a layer, from `rank` down to about `target`.
State: A, B, e, and two running averages of each number's importance.
Cost: a LoRA of the present rank, and a pass over its numbers in every step; merged: none.
Use: layers that need very different ranks, at one budget.
Against: it starts with more parameters than it ends with, and a layer never wins a rank back. PEFT's
comparison has it below LoRA (37.3 against 47.8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.methods.base.checks import check_above_zero, check_dropout, check_rank
from veneer.methods.base.delta import Delta, FactoredDelta, master_dtype
from veneer.methods.base.factors import ROWWISE, Factors
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors
from veneer.methods.base.protocols import Resizes
from veneer.ops.draws import keyed
from veneer.sites import Site

NAMES = ("A", "E", "B")
TINY = 1e-5  # which PEFT adds to the rank it divides by


@final
class AdaLoRA(FactoredDelta, PeftStored, Resizes):
    """A (r, in) and B (out, r) normal of size 0.02, E (r, 1) zero; ranks fall while it trains."""

    roles = {"A": "factor", "B": "factor", "E": "factor"}
    steps: Tensor  # that were observed
    peft_settings = {
        "init_r": 12,
        "target_r": 8,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
        "total_step": 1,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "bias": "none",
        "r": 8,
        "rank_pattern": None,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
    }

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 12,
        target: int = 8,
        alpha: float | None = None,
        begin: float = 0.1,
        end: float = 0.3,
        every: int = 10,
        orthogonality: float = 0.1,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """
        rank: r of every layer at the start, at most min(out, in)
        target: mean r of the layers at the end
        alpha: s = alpha / rank, at any later rank too (default: 2 x rank)
        begin: share of the steps before the first triplet is removed
        end: share of the steps after the last one is removed
        every: steps from one removal to the next
        orthogonality: weight of ||A A' - I||^2 + ||B' B - I||^2 in the loss
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        seed: key of the random draws, together with the layer's name
        """
        super().__init__()
        check_rank(rank, site)
        check_dropout(dropout)
        check_above_zero(alpha=alpha)
        _check(rank, target, begin, end, every, orthogonality)
        self.dropout, self.scaling = dropout, (2.0 * rank if alpha is None else alpha) / rank
        draw, like = keyed(seed, site.key), torch.empty((), dtype=master_dtype(site), device=site.device)
        self.A = nn.Parameter((0.02 * torch.randn(rank, site.in_, generator=draw)).to(like))
        self.B = nn.Parameter((0.02 * torch.randn(site.out, rank, generator=draw)).to(like))
        self.E = nn.Parameter(like.new_zeros(rank, 1))
        for name in NAMES:
            self.register_buffer(f"mean_{name}", torch.zeros_like(self.get_parameter(name)))
            self.register_buffer(f"spread_{name}", torch.zeros_like(self.get_parameter(name)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def factors(self, site: Site) -> Factors:
        return Factors(self.A, self.scaling * self.B * self.E.mT)

    @torch.no_grad()
    def regularise(self) -> None:
        """Adds the gradient of ||A A' - I||^2 + ||B' B - I||^2, times its weight, to those of A and B."""
        weight = self.options["orthogonality"]
        for p, wide in ((self.A, self.A), (self.B, self.B.mT)):
            excess = wide @ wide.mT - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
            change = 4 * weight * excess @ wide
            if p.grad is not None:
                p.grad += change if wide is p else change.mT

    @torch.no_grad()
    def observe(self, smoothing: float = 0.85) -> None:
        """Takes the gradients of a step into the running averages of every number's importance."""
        self.steps += 1
        for name in NAMES:
            p = self.get_parameter(name)
            if p.grad is None:
                continue
            now, mean, spread = (p * p.grad).abs(), *self._averages(name)
            mean.lerp_(now, 1 - smoothing)
            spread.lerp_((now - mean).abs(), 1 - smoothing)

    def _averages(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"mean_{name}"), self.get_buffer(f"spread_{name}")

    def importance(self) -> Tensor:
        """Returns the importance of every triplet (r,)."""
        A, E, B = (torch.mul(*self._averages(name)) for name in NAMES)
        return E[:, 0] + A.mean(1) + B.mean(0)

    @torch.no_grad()
    def cut(self, kept: Tensor, optimiser: torch.optim.Optimizer | None = None) -> None:
        """Keeps the triplets numbered `kept` and frees the others, in the optimiser's state too."""
        for name in NAMES:
            p, dim = self.get_parameter(name), 1 if name == "B" else 0
            whole = p.shape
            state = optimiser.state.get(p, {}) if optimiser is not None else {}
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == whole:
                    state[key] = value.index_select(dim, kept)
            p.grad = None
            p.data = p.data.index_select(dim, kept)
            for kind in ("mean", "spread"):
                self.register_buffer(
                    f"{kind}_{name}", self.get_buffer(f"{kind}_{name}").index_select(dim, kept)
                )

    def resize(self, sizes: Mapping[str, torch.Size]) -> None:
        r = min(sizes["E"][0], self.options["rank"])
        for name in NAMES:
            p = self.get_parameter(name)
            shape = (len(p), r) if name == "B" else (r, p.shape[1])
            if p.shape != shape:
                p.data = p.data.new_zeros(shape)
                self.register_buffer(f"mean_{name}", torch.zeros_like(p.data))
                self.register_buffer(f"spread_{name}", torch.zeros_like(p.data))

    def to_peft(self, site: Site) -> PeftForm | None:
        """Returns PEFT's tensors at the rank of the start: removed triplets are zero there."""
        if site.kind not in ROWWISE:
            return None
        r, most = len(self.E), self.options["rank"]
        tensors = {
            "lora_A": nn.functional.pad(self.A.detach(), (0, 0, 0, most - r)),
            "lora_B": nn.functional.pad(self.B.detach(), (0, most - r)),
            "lora_E": nn.functional.pad(self.E.detach(), (0, 0, 0, most - r)),
        }
        own = {"init_r": most, "target_r": self.options["target"], "lora_alpha": self.scaling * (most + TINY)}
        config = {"peft_type": "ADALORA", **own, "lora_dropout": self.dropout}
        config |= {"orth_reg_weight": self.options["orthogonality"], "kept": r}
        return PeftForm(config, tensors)

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "ADALORA"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        """PEFT divides alpha by the rank of the start, also where it saved fewer triplets."""
        most = int(config["init_r"])
        E = tensors.get("lora_E")
        r = len(E) if E is not None and E.ndim == 2 else most
        shapes: dict[str, tuple[int, ...]]
        shapes = {"lora_A": (r, site.in_), "lora_B": (site.out, r), "lora_E": (r, 1)}
        check_peft_tensors(site, {n: tensors[n] for n in shapes if n in tensors}, shapes)
        options = {"rank": most, "target": min(int(config["target_r"]), most)}
        options |= {"alpha": config["lora_alpha"] * most / (most + TINY), "dropout": config["lora_dropout"]}
        delta = build(cls, site, {**options, "orthogonality": config["orth_reg_weight"]})
        assert isinstance(delta, AdaLoRA)
        delta.cut(torch.arange(config.get("kept", r)))
        with torch.no_grad():
            delta.A.copy_(tensors["lora_A"][: len(delta.E)])
            delta.B.copy_(tensors["lora_B"][:, : len(delta.E)])
            delta.E.copy_(tensors["lora_E"][: len(delta.E)])
        return delta


def _check(rank: int, target: int, begin: float, end: float, every: int, orthogonality: float) -> None:
    problems = []
    if not 1 <= target <= rank:
        problems.append(f"target must be from 1 to the rank {rank}, got {target}")
    if not (0 <= begin and 0 <= end and begin + end < 1):
        problems.append(f"begin and end must be shares with a sum below 1, got {begin} and {end}")
    if every < 1:
        problems.append(f"every must be 1 or more steps, got {every}")
    if not 0 <= orthogonality < math.inf:
        problems.append(f"orthogonality must be 0 or more, got {orthogonality}")
    if problems:
        raise ConfigError("\n".join(problems))
