"""A bank whose layers compute base and adapters in one kernel, where that is faster.

A hook in front of the layer keeps its input and hands on no rows; the hook behind it returns all of them,
from `veneer.ops.fused`. Sums, gains and layers that the kernel does not compute take the usual way.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.banks.program import Program
from veneer.adapt.banks.segments import SegmentBank, SegmentLayer
from veneer.adapt.banks.stacks import PLACES
from veneer.methods.base.protocols import TurnsInput
from veneer.ops.fused import product as fused
from veneer.ops.lowrank import is_traced
from veneer.sites import Site


class Job(NamedTuple):
    """A layer's input (rows, in), its shape, and the factors of each stack."""

    x: Tensor
    shape: torch.Size
    stacks: dict[int, tuple[Tensor, Tensor]]
    plan: fused.Plan


def one_pass_bank(model: nn.Module, rows: tuple[int, int]) -> SegmentBank:
    """Returns a bank that uses the kernel for batches with so many rows an adapter, least and most."""
    return SegmentBank(model, partial(OnePassLayer, sizes=rows))


class OnePassLayer(SegmentLayer, TurnsInput):
    """Computes a layer and each row's own adapter at once."""

    def __init__(self, bank: SegmentBank, site: Site, *, sizes: tuple[int, int]) -> None:
        super().__init__(bank, site)
        self.least, self.most = sizes
        self.job: Job | None = None

    def turned(self, x: Tensor, site: Site) -> Tensor | None:
        self.job = self._job(x, site)
        if self.job is not None:
            return x[:0]
        c = self.input_gain(x, site)
        return None if c is None else torch.addcmul(x, x, c - 1)

    @torch.no_grad()
    def onto(self, x: Tensor, y: Tensor, site: Site, *, writable: bool) -> Tensor:
        job, self.job = self.job, None
        if job is None:
            return super().onto(x, y, site, writable=writable)
        found = fused.product(job.x, site.weight(), site.module.bias, job.stacks, job.plan)
        return found.view(*job.shape[:-1], -1)

    def _job(self, x: Tensor, site: Site) -> Job | None:
        program, layer = self._program(x), site.module
        if program is None or not self._takes(program, x, site):
            return None
        stacks = {}
        for number in program.plan.stretches:
            own = self._layer(number)
            factors = None if own is None else own.factors(0, PLACES)
            if factors is not None:
                stacks[number] = factors
        right = stacks and all(fused.fits(layer.weight, A.shape[1]) for A, _ in stacks.values())
        return Job(x.reshape(program.rows, -1), x.shape, stacks, program.plan) if right else None

    def _takes(self, program: Program, x: Tensor, site: Site) -> bool:
        layer = site.module
        same = x.dtype == layer.weight.dtype and x.device == layer.weight.device
        return (
            same
            and _is_alone(layer)
            and program.is_plain
            and all(self.least <= s.rows <= self.most for _, s in program.segments)
            and not torch.is_grad_enabled()
            and not is_traced()
        )


def _is_alone(layer: nn.Module) -> bool:
    """Tells if a plain Linear has no hook beside ours: another would see no rows."""
    own = nn.modules.module
    everywhere = own._global_forward_hooks or own._global_forward_pre_hooks
    plain = type(layer) is nn.Linear and "forward" not in layer.__dict__
    return plain and not everywhere and len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1
