"""Trained rank pruning, for one's own loop.  Xu et al. 2020, https://arxiv.org/abs/2004.14566

Every `every` steps each weight, in its matrix form, takes the exact proximal step of the nuclear norm, which
lowers all singular values by the summed learning rates times `nuclear`, and is projected to the rank that
holds the share `energy` of its squared singular values, or to ranks of all layers within a budget of
parameters. The optimiser's momentum is projected to the same directions. `finish` factors every layer of
which that leaves fewer parameters.

Differs from the authors' release, which subtracts a subgradient of the nuclear norm restricted to the kept
directions (so that the smallest never shrink), and cuts at an absolute singular value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.compress.places import Places
from veneer.compress.trp.forms import Form, form_of
from veneer.errors import ConfigError, SiteError
from veneer.ops import allocate
from veneer.ops.allocate import Choice
from veneer.ops.matrix.shrink import Spectrum, rank_of_energy, soften, spectrum
from veneer.sites.factored.layers import rank_within
from veneer.sites.find import named
from veneer.sites.finding.names import Target


class TRP:
    """Keeps a model near low rank while an optimiser trains it.

    trp = veneer.TRP(model, adam, budget=0.5)
    for batch in data:
        ...; adam.step(); trp.step()
    model = trp.finish()
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        *,
        energy: float = 0.9,
        budget: float | None = None,
        form: Literal["channel", "spatial"] = "channel",
        every: int = 20,
        nuclear: float = 3e-4,
        to: Target | None = None,
        exclude: Target = (),
    ) -> None:
        """
        energy: share of a layer's squared singular values that a projection keeps
        budget: share of the layers' parameters instead, divided among them by relative energy
        form: of convolutions, channel (NC) or spatial (VH)
        every: steps between projections
        nuclear: weight of the nuclear norm in the loss
        to: layers; all linear ones and convolutions that can be factored unless given
        exclude: layers left alone

        Raises ConfigError and SiteError for settings out of range and for models without such layers.
        """
        _check(energy, budget, every, nuclear)
        names = named(model, to, exclude, lambda m: form_of(m, form) is not None)
        if not names:
            raise SiteError("the model has no linear layer or convolution that a low rank could make smaller")
        self.model, self.optimiser = model, optimiser
        modules = dict(model.named_modules())
        self.forms: dict[str, Form] = {n: f for n in names if (f := form_of(modules[n], form)) is not None}
        self.energy, self.budget, self.every, self.nuclear = energy, budget, every, nuclear
        self.steps, self.owed = 0, 0.0
        self._projected: dict[str, int] | None = None  # the ranks, until the next step
        self._rates = {id(p): group for group in optimiser.param_groups for p in group["params"]}

    def step(self) -> None:
        """Counts a step of the optimiser; every `every` steps all layers are shrunk and projected."""
        self.steps += 1
        self._projected = None
        self.owed += self._rate() * self.nuclear
        if self.steps % self.every == 0:
            self.project()

    def _rate(self) -> float:
        """The learning rate of the first layer's weight; the first group's where it is not trained."""
        first = next(iter(self.forms.values())).weight
        group = self._rates.get(id(first), self.optimiser.param_groups[0])
        return float(group["lr"])

    @torch.no_grad()
    def project(self) -> dict[str, int]:
        """Shrinks and projects all layers now, and returns their ranks."""
        found = {n: spectrum(f.matrix(f.weight)) for n, f in self.forms.items()}
        shrunk = {n: s.S * soften(s.S, self.owed) for n, s in found.items()}
        self.owed = 0.0
        ranks = self.ranks(shrunk)
        for n, f in self.forms.items():
            S, kept = found[n].S, shrunk[n][: ranks[n]]
            w = kept / S[: len(kept)].clamp_min(torch.finfo(S.dtype).tiny)
            f.put(found[n].weigh(f.matrix(f.weight), w))
            self._project_momentum(f, found[n], (w > 0).to(w))
        self._projected = ranks
        return ranks

    def _project_momentum(self, form: Form, found: Spectrum, w: Tensor) -> None:
        """Takes out of the momentum what would move the weight off the kept directions at once."""
        state: Mapping[str, Any] = self.optimiser.state.get(form.weight, {})
        for key in ("momentum_buffer", "exp_avg"):
            m = state.get(key)
            if isinstance(m, Tensor):
                m.copy_(form.tensor(found.weigh(form.matrix(m), w)))

    def ranks(self, spectra: Mapping[str, Tensor]) -> dict[str, int]:
        """Returns the rank of every layer: by energy, or within the budget."""
        if self.budget is None:
            return {n: rank_of_energy(S, self.energy) for n, S in spectra.items()}
        names = list(spectra)
        menus = [_menu(self.forms[n].shape, spectra[n]) for n in names]
        total = sum(f.weight.numel() for f in self.forms.values())
        chosen = allocate.heap(menus, int(self.budget * total))
        return {n: _rank(i, self.forms[n].shape) for n, i in zip(names, chosen, strict=True)}

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """Projects what was trained since, replaces layers that get smaller, and returns the model."""
        ranks, places = self._projected or self.project(), Places(self.model)
        for n, f in self.forms.items():
            m, k = f.shape
            r = ranks[n]
            if r * (m + k) < m * k:
                W = f.matrix(f.weight).detach()
                U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
                root = S[:r].sqrt()
                A, B = (root[:, None] * Vh[:r]).to(W.dtype), (U[:, :r] * root).to(W.dtype)
                places.put(f.layer, f.factored(A, B))
        return self.model


def _menu(shape: tuple[int, int], S: Tensor) -> list[Choice]:
    """Ranks below break-even, and all of them; the loss is the share of squared singular values left out."""
    m, n = shape
    squares = S.double().square()
    left = (squares.flip(0).cumsum(0).flip(0) / squares.sum().clamp_min(1e-300)).tolist()
    return [
        Choice(r * (m + n), left[r] if r < len(left) else 0.0) for r in range(1, _break_even(shape) + 1)
    ] + [Choice(m * n, 0.0)]


def _rank(index: int, shape: tuple[int, int]) -> int:
    """The rank of a menu's entry; the last one stands for all singular values."""
    return index + 1 if index < _break_even(shape) else min(shape)


def _break_even(shape: tuple[int, int]) -> int:
    """The largest rank with fewer numbers than the matrix; at least 1."""
    m, n = shape
    return max(1, rank_within(m, n, m * n - 1))


def _check(energy: float, budget: float | None, every: int, nuclear: float) -> None:
    problems = [] if 0 < energy <= 1 else [f"energy must be above 0 and at most 1, got {energy}"]
    if budget is not None and not 0 < budget <= 1:
        problems.append(f"budget must be above 0 and at most 1, got {budget}")
    if every < 1:
        problems.append(f"every must be 1 or more, got {every}")
    if nuclear < 0:
        problems.append(f"nuclear must be 0 or more, got {nuclear}")
    if problems:
        raise ConfigError("\n".join(problems))
