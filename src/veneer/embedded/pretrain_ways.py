"""Optimisers of the pretraining script: Muon, AdamW, GaLore or ReLoRA for the matrices in blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from torch import nn

from veneer.adapt.attach import attach
from veneer.adapt.attached import changes
from veneer.adapt.merge import merge
from veneer.optim import Trained, make
from veneer.optim.base.groups import adamw, by_rate, of_base
from veneer.train import relora

BETAS = (0.9, 0.95)
NAME = "default"  # of the adapter


def add_arguments(p: ArgumentParser) -> None:
    """Adds the flags of all optimisers."""
    p.add_argument(
        "--via", choices=sorted(WAYS), default="muon", help="optimiser of the matrices inside the blocks"
    )
    p.add_argument(
        "--matrix-lr",
        type=float,
        help="rate of the matrices under full, galore and relora (default: --adam-lr)",
    )
    p.add_argument("--factor-lr", type=float, help="rate of relora's A (default: twice that of the matrices)")
    p.add_argument("--rank", type=int, default=64, help="rank of galore and relora")
    p.add_argument(
        "--period",
        type=int,
        default=200,
        help="steps between galore's updates of the subspace, and between relora's restarts",
    )
    p.add_argument("--full-steps", type=int, default=200, help="steps at full rank before relora begins")
    p.add_argument("--rewarm", type=int, default=20, help="steps of warm-up after a restart of relora")
    p.add_argument(
        "--ratio", type=float, default=1.0, help="rate of relora's B relative to A's; 16 is LoRA+'s"
    )


class Via(ABC):
    """Optimisers of a model, with the peak rate of each group as `initial_lr`, and actions between steps."""

    optimisers: list[torch.optim.Optimizer]

    @abstractmethod
    def __init__(self, model: nn.Module, args: Namespace) -> None: ...

    def before(self, step: int) -> float:
        """Acts before a step, also in a resumed training; returns the share of the peak rate for the step."""
        return 1.0

    def finish(self) -> None:  # noqa: B027  (most ways train a plain model)
        """Turns the model into a plain one."""


def _peak(optimiser: torch.optim.Optimizer, lr: float) -> torch.optim.Optimizer:
    for group in optimiser.param_groups:
        group["initial_lr"] = lr * group.get("scale", 1.0)
    return optimiser


def _matrix_lr(args: Namespace) -> float:
    return args.adam_lr if args.matrix_lr is None else float(args.matrix_lr)


def _inside(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the matrices inside the blocks, and all other parameters."""
    every = list(model.named_parameters())
    inside = [p for n, p in every if p.ndim == 2 and "embed_tokens" not in n]
    return inside, [p for n, p in every if p.ndim != 2 or "embed_tokens" in n]


class Muon(Via):
    """Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/"""

    def __init__(self, model: nn.Module, args: Namespace) -> None:
        inside, outside = _inside(model)
        muon = torch.optim.Muon(inside, lr=args.muon_lr, weight_decay=0.05, adjust_lr_fn="original")
        adam = torch.optim.AdamW(outside, lr=args.adam_lr, betas=BETAS, weight_decay=0.0, fused=True)
        self.optimisers = [_peak(muon, args.muon_lr), _peak(adam, args.adam_lr)]


class Full(Via):
    """AdamW on all parameters."""

    def __init__(self, model: nn.Module, args: Namespace) -> None:
        self.optimisers = [
            _peak(
                adamw(of_base(model), {"matrix": _matrix_lr(args) / args.adam_lr}, betas=BETAS), args.adam_lr
            )
        ]


class GaLore(Via):
    """GaLore, see optim/galore.py."""

    def __init__(self, model: nn.Module, args: Namespace) -> None:
        how = make("galore", rank=args.rank, period=args.period)
        self.optimisers = [_peak(how.build(Trained(of_base(model), BETAS)), args.adam_lr)]
        for group in self.optimisers[0].param_groups:
            if group["names"]:
                group["initial_lr"] = _matrix_lr(args)


class ReLoRA(Via):
    """ReLoRA, see train/relora.py: full matrices for `full_steps`, then factors, merged every `period` steps.

    A checkpoint holds weights, factors and moments. Actions before a step depend on its number only, so a
    resumed training continues exactly. Checkpoints are saved before the restart of their step.
    """

    def __init__(self, model: nn.Module, args: Namespace) -> None:
        self.model, self.args = model, args
        parts = of_base(model)
        attach(model, "lora", rank=args.rank, name=NAME, seed=args.seed)
        relora.check(model, NAME)
        found = changes(model, NAME)
        self.matrices = [site.module.weight for site, _ in found]
        self.factors = [p for _, delta in found for p in delta.parameters()]
        matrix = _matrix_lr(args) / args.adam_lr
        factor = 2 * matrix if args.factor_lr is None else args.factor_lr / args.adam_lr
        groups: list[dict[str, Any]] = [
            *by_rate(parts, {"matrix": matrix}),
            {"params": [d.A for _, d in found], "scale": factor},
        ]
        groups.append({"params": [d.B for _, d in found], "scale": factor * args.ratio})
        self.optimisers = [
            _peak(torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True), args.adam_lr)
        ]
        model.requires_grad_(True)

    def before(self, step: int) -> float:
        first, period = self.args.full_steps, self.args.period
        for p in self.matrices:
            p.requires_grad_(step < first)
        for p in self.factors:
            p.requires_grad_(step >= first)
        if step >= first:
            self._let_go()
        if step > first and (step - first) % period == 0:
            relora.restart(self.model, NAME, self.optimisers, (step - first) // period)
        return relora.jagged(step, first, period, self.args.rewarm)

    def _let_go(self) -> None:
        """Drops the moments of the matrices, which are frozen from now on."""
        for p in self.matrices:
            self.optimisers[0].state.pop(p, None)

    def finish(self) -> None:
        merge(self.model, NAME, probe={}, force=True)


WAYS: dict[str, type[Via]] = {"muon": Muon, "full": Full, "galore": GaLore, "relora": ReLoRA}
