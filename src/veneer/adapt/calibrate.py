"""Sketches the loss's gradient in every weight from a few batches, for data-dependent starts.

Every layer gets a delta that is zero, Y Omega' + Psi' Z with fixed random Omega, Psi and Y = Z = 0. The
gradient of the loss in Y is then G Omega and in Z it is Psi G, where G (out, in) is the gradient in the
weight: ops/matrix/sketch.py rebuilds G's leading part from both. Nothing of a weight's size is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.attach import detach
from veneer.adapt.attached import changes, layers
from veneer.adapt.calls import check_called
from veneer.adapt.hooks import check_name, hang, refuse_compiled
from veneer.adapt.modes import evaluating
from veneer.errors import ConfigError, DataError, SiteError, first_few
from veneer.methods import Delta, Factors, Stats
from veneer.methods.base.delta import master_dtype
from veneer.methods.base.moments import Moments, over_processes
from veneer.ops.draws import keyed
from veneer.ops.matrix import sketch
from veneer.sites import Site, find
from veneer.sites.find import ALL
from veneer.sites.finding.names import Target

NAME = "calibration"  # of the adapter that is there meanwhile
Loss = Callable[[nn.Module, Any], Tensor]


class Sketched(Delta):
    """Y (out, k) and Z (l, in), zero; gradients are summed in float64, so that order does not matter."""

    Omega: Tensor
    Psi: Tensor

    def __init__(self, site: Site, k: int, seed: int) -> None:
        super().__init__()
        fixed = sketch.tests(site.out, site.in_, k, keyed(seed, f"{site.name} gradient"))
        self.register_buffer("Omega", fixed.Omega.to(site.device, master_dtype(site)))
        self.register_buffer("Psi", fixed.Psi.to(self.Omega))
        self.Y = nn.Parameter(self.Omega.new_zeros(site.out, self.Omega.shape[1]))
        self.Z = nn.Parameter(self.Omega.new_zeros(self.Psi.shape[0], site.in_))
        self.sums = [torch.zeros_like(p, dtype=torch.float64) for p in (self.Y, self.Z)]
        self.moments: Moments | None = None

    def factors(self, site: Site) -> Factors:
        return Factors(torch.cat([self.Omega.mT, self.Z]), torch.cat([self.Y, self.Psi.mT], 1))

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Returns zero, computed in the sketch's precision whatever the model computes in."""
        with torch.autocast(y.device.type, enabled=False):
            wide = y.to(self.Y.dtype)
            if self.moments is not None:
                self.moments.see(x.detach(), site)
            x = self.dropped(x.detach(), wide, site)
            return self.factors(site).added(x, wide, site).to(y.dtype)

    def delta(self, site: Site) -> Tensor:
        return self.factors(site).dense(site)

    def collect(self) -> None:
        """Adds the gradients of the batch to the sums and drops them."""
        for p, total in zip((self.Y, self.Z), self.sums, strict=True):
            if p.grad is not None:
                total += p.grad
            p.grad = None

    def leading(self, rank: int) -> sketch.Svd:
        """Returns the gradient's leading triplets, from the sums over all processes."""
        Y, Z = (over_processes(total).to(self.Y.dtype) for total in self.sums)
        if not (torch.isfinite(Y).all() and torch.isfinite(Z).all()):
            return sketch.Svd(*(Y.new_full((), torch.nan),) * 3)
        return sketch.leading(Y, Z, self.Psi, rank)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rank: int = 8,
    to: Target | None = None,
    exclude: Target = (),
    untie: bool = False,
    loss: Loss | None = None,
    width: int = 4,
    seed: int = 0,
    inputs: bool = False,
) -> dict[str, Stats]:
    """Returns gradient statistics by layer for attach(.., stats=..). The model is left unchanged.

    The gradient is that of the sum of `loss(model, batch)` over the batches, in eval mode, with the acting
    adapters on; under torch.distributed every process brings its own batches and all get the sum. rank: the
    largest to be attached. to, exclude, untie: as in attach. loss: returns a scalar; `model(**batch).loss`
    unless given. width: columns of the sketch in ranks; a layer takes about 20 (out + 2 in) width rank bytes
    meanwhile and 8 (out + in) rank afterwards. inputs: statistics of the layers' inputs too, for the starts
    eva and corda; 8 in^2 bytes more meanwhile, once for layers that read one tensor. Raises DataError
    without a batch, SiteError naming layers without a gradient.
    """
    refuse_compiled(model)
    check_name(model, NAME)
    _check_numbers(rank, width)
    sites = find(model, "all-linear" if to is None else to, exclude, untie)
    probes = [(site, Sketched(site, width * rank, seed)) for site in sites]
    moments = Moments() if inputs else None
    for _, probe in probes:
        probe.moments = moments
    with _hung(model, probes, to is None or to == ALL), evaluating(model), torch.enable_grad():
        seen = _sum_gradients(model, batches, loss or _own_loss, [probe for _, probe in probes])
        reached = {site.name for site, _ in changes(model, NAME)}
    if not seen:
        raise DataError("calibration got no batch; pass some of the training's text")
    found = {site.name: probe.leading(2 * rank) for site, probe in probes if site.name in reached}
    _check_gradients(found)
    stats = {name: Stats(gradient) for name, gradient in found.items()}
    return stats if moments is None else moments.joined(stats, [site for site, _ in probes], rank)


def _sum_gradients(model: nn.Module, batches: Iterable[Any], loss: Loss, probes: list[Sketched]) -> int:
    """Sums the batches' gradients into the sketches and returns the number of processes that had some."""
    seen = torch.zeros((), dtype=torch.int64, device=probes[0].Y.device)
    for batch in batches:
        _scalar(loss(model, batch)).backward()
        seen = torch.ones_like(seen)
        for probe in probes:
            probe.collect()
    if seen:
        check_called(model)
    return int(over_processes(seen))


def _check_numbers(rank: int, width: int) -> None:
    problems = [f"rank {rank} must be 1 or more"] if rank < 1 else []
    problems += (
        [f"width {width} must be 2 or more: a start of rank r needs 2 r directions"] if width < 2 else []
    )
    if problems:
        raise ConfigError("\n".join(problems))


def _own_loss(model: nn.Module, batch: Any) -> Any:
    found = model(**batch)
    return getattr(found, "loss", None)


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ConfigError(
            f"calibration needs one number to differentiate for each batch, not {what}; put labels into "
            "the batches, or pass loss="
        )
    return value


@contextmanager
def _hung(model: nn.Module, probes: list[tuple[Site, Sketched]], by_default: bool) -> Iterator[None]:
    """Within the block the sketches act beside the acting adapters, and alone take gradients."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    called = [(d, d.called) for d in layers(model)]
    hang(model, NAME, list(probes), by_default)
    for p, _ in before:
        p.requires_grad_(False)
    for d in layers(model):
        d.called = NAME not in d
    try:
        yield
    finally:
        detach(model, NAME)
        for p, wanted in before:
            p.requires_grad_(wanted)
        for d, was in called:
            d.called = was


def _check_gradients(found: dict[str, sketch.Svd]) -> None:
    wild = [n for n, g in found.items() if not bool(torch.isfinite(g.S).all())]
    none = [n for n, g in found.items() if n not in wild and not g.S.any()]
    problems = []
    if wild:
        problems.append(
            f"the gradient is not finite at {len(wild)} layers: {first_few(wild)}; are the batches and the "
            "precision right?"
        )
    if none:
        problems.append(
            f"the loss has no gradient at {len(none)} layers: {first_few(none)}; is every label masked? Or "
            "leave them out with exclude="
        )
    if problems:
        raise SiteError("\n".join(problems))
