"""Measures, before any block is changed, what each layer's singular directions are worth to the model's loss.

The loss is the cross-entropy of labels drawn from the model's own predictions, whose second derivatives are
those of the KL divergence from the model (the Fisher information). One pass forward keeps the hidden states
at every block; one pass backward, a block at a time, sums the inputs' moments C and those of the gradients at
the outputs R. In this metric cutting a direction of singular value s costs s^2 / 2 nats a token (KFAC); a
second pass over the block measures the same from the gradients of whole samples, whose tokens act together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.compress.lowrank.candidates import Candidate, tensors
from veneer.compress.lowrank.moments import Moments, Watch
from veneer.compress.lowrank.recipe import Recipe
from veneer.compress.lowrank.sources import Source
from veneer.compress.lowrank.walk import Batch, Entered
from veneer.compress.lowrank.work import Work
from veneer.errors import DataError, SiteError, first_few
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import precise
from veneer.ops.matrix.whitening import Parts, decompose, regularised
from veneer.sites import Site

# Shares of the mean diagonal that are added to it: of the gradients' moments, which are noisier than the
# inputs', and of the inputs' with more tokens than inputs, and with fewer.
SLOPES, ENOUGH, FEW = 0.01, 1e-6, 1e-2


def survey(source: Source, batches: Sequence[Batch], recipe: Recipe, seed: int, work: Work) -> None:
    """Keeps the candidates of every block's layers in the work folder, from the last block to the first."""
    names = [f"survey-{i:03}" for i in range(len(source))]
    if work.has(names[0]):
        return
    entered = [source.walk.enter(b) for b in batches]
    end = _forward(source, entered, work)
    left = next((i for i in range(len(source)) if work.has(names[i])), len(source))  # blocks below it
    if end is None:
        slopes = work.get_list(f"slopes-{left:03}")  # those of higher blocks are dropped already
    else:
        slopes = _slopes_at_end(source, entered, batches, end, seed)
    for i in reversed(range(left)):
        with source.block(i) as block:
            entries = work.get_list(f"entry-{i:03}")
            view = View(i, block, source.sites(i, block), entered, entries, slopes)
            found, metrics, slopes = _block(view, recipe)
        work.put_list(f"slopes-{i:03}", slopes)
        work.put(names[i], {**tensors(found), **metrics})
        work.drop(f"entry-{i:03}")
        work.drop(f"slopes-{i + 1:03}")
    work.drop("slopes-000")


@torch.no_grad()
def _forward(source: Source, entered: Sequence[Entered], work: Work) -> list[Tensor] | None:
    """Keeps the hidden states at every block not yet surveyed, and returns those at the end; None if none is
    needed.
    """
    last = len(source) - 1
    if work.has(f"survey-{last:03}"):
        return None
    hidden = [e.hidden for e in entered]
    for i in range(len(source)):
        if not work.has(f"entry-{i:03}"):
            work.put_list(f"entry-{i:03}", hidden)
        with source.block(i) as block:
            hidden = [e.run(i, block, x) for e, x in zip(entered, hidden, strict=True)]
    return hidden


def _slopes_at_end(
    source: Source, entered: Sequence[Entered], batches: Sequence[Batch], hidden: Sequence[Tensor], seed: int
) -> list[Tensor]:
    """The gradients (b, t, width) of the summed loss of drawn labels at the last block's output."""
    found, draw = [], keyed(seed, "labels of the survey")
    for e, batch, x in zip(entered, batches, hidden, strict=True):
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            whole = precise(source.walk.leave(x, batch))
            logits = whole.flatten(0, -2)
            uniform = torch.rand(len(logits), 1, generator=draw).to(logits)
            with torch.no_grad():
                reached = logits.softmax(-1).cumsum(-1)
                drawn = torch.searchsorted(reached, uniform * reached[:, -1:])[:, 0]
                labels = drawn.clamp_max(logits.shape[-1] - 1)
            if e.mask is not None and whole.shape[:-1] == e.mask.shape:
                labels = labels.masked_fill(~e.mask.flatten(), -100)
            F.cross_entropy(logits, labels, reduction="sum").backward()
        assert x.grad is not None
        found.append(x.grad)
    if not all(bool(torch.isfinite(g).all()) for g in found):
        raise DataError(
            "data: the loss's gradient is not finite on the calibration texts; check model and dtype"
        )
    return found


class View(NamedTuple):
    """A block and its layers, with hidden states that enter it and gradients at its output, by batch."""

    i: int
    block: nn.Module
    sites: Mapping[str, Site]
    entered: Sequence[Entered]
    entries: Sequence[Tensor]
    slopes: Sequence[Tensor]

    def backward(self) -> Iterator[tuple[Entered, Callable[[], Tensor]]]:
        """Yields each batch with a call that passes it forward and back, and returns the gradient that
        enters.
        """
        for e, x, g in zip(self.entered, self.entries, self.slopes, strict=True):
            yield e, lambda e=e, x=x, g=g: self._back(e, x, g)  # type: ignore[misc]

    def _back(self, e: Entered, x: Tensor, g: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            e.run(self.i, self.block, x).backward(g)
        assert x.grad is not None
        return x.grad


def _block(view: View, recipe: Recipe) -> tuple[dict[str, list[Candidate]], dict[str, Tensor], list[Tensor]]:
    """The candidates of a block's layers, their outputs' metrics, and the gradients before the block."""
    sites, watch, back = view.sites, Watch(view.sites, slopes=True), []
    for e, passes in view.backward():
        with watch.over(e.mask):
            back.append(passes())
    silent = [n for n in sites if n not in watch.inputs or not watch.slopes[n].n]
    if silent:
        raise SiteError(f"block {view.i}: layers without a gradient: {first_few(silent)}; exclude them")
    parts = {n: variants(s, watch.inputs[n], watch.slopes[n], recipe) for n, s in sites.items()}
    sampled = None if recipe.score == "curvature" else _sampled(view, parts)
    found: dict[str, list[Candidate]] = {}
    for n, some in parts.items():
        dtype = precise(sites[n].weight()).dtype
        for j, (p, mean) in enumerate(some):
            score = _score(recipe.score, p, None if sampled is None else sampled[n][j])
            found.setdefault(n, []).append(Candidate.of(p, score, mean, dtype))
    metrics = (
        {f"{n}|R": regularised(watch.slopes[n].moment(), SLOPES) for n in sites} if recipe.anchored else {}
    )
    return found, metrics, back


Variant = tuple[Parts, Tensor | None]


def variants(site: Site, inputs: Moments, slopes: Moments | None, recipe: Recipe) -> list[Variant]:
    """W's parts in the metric of these moments, each with the inputs' mean where a bias takes its part."""
    R = None if slopes is None else regularised(slopes.moment(), SLOPES)
    W = site.weight().detach()
    centres = {"never": (False,), "always": (True,), "choose": (False, True)}[recipe.centre]
    return [
        (decompose(W, inputs_metric(inputs, centred), R), inputs.mean if centred else None)
        for centred in centres
    ]


def inputs_metric(inputs: Moments, centred: bool) -> Tensor:
    """E[x x'] (in, in), regularised more where there were fewer rows than inputs."""
    return regularised(inputs.moment(centred), ENOUGH if inputs.n >= len(inputs.total) else FEW)


def _score(kind: str, parts: Parts, sampled: Tensor | None) -> Tensor:
    """The predicted loss (k,) of leaving each direction out, in nats a token."""
    curvature = parts.S.square() / 2
    if sampled is None:
        return curvature
    return sampled if kind == "gradients" else (curvature + sampled) / 2


def _sampled(view: View, parts: Mapping[str, Sequence[Variant]]) -> dict[str, list[Tensor]]:
    """Half the mean square, over samples, of the loss's derivative in every direction's size, per token."""
    sums = {n: [torch.zeros_like(p.S) for p, _ in some] for n, some in parts.items()}
    mask: Tensor | None = None

    def hooked(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            y.register_hook(lambda g: _add(sums[name], parts[name], args[0].detach(), g, mask))

        return hook

    handles = [s.module.register_forward_hook(hooked(n)) for n, s in view.sites.items()]
    n = 0
    try:
        for e, passes in view.backward():
            mask = e.mask
            n += e.hidden.shape[:-1].numel() if mask is None else int(mask.sum())
            passes()
    finally:
        for handle in handles:
            handle.remove()
    return {name: [s / (2 * n) for s in some] for name, some in sums.items()}


def _add(sums: list[Tensor], parts: Sequence[Variant], x: Tensor, g: Tensor, mask: Tensor | None) -> None:
    """Adds each sample's squared derivative: (sum over its tokens of (g . b_i) (a_i . x))^2."""
    for total, (p, mean) in zip(sums, parts, strict=True):
        left = (x if mean is None else x - mean.to(x)) @ p.A.to(x.dtype).mT  # (b, t, k)
        both = left * (g @ p.B.to(g.dtype))
        if mask is not None and both.shape[:-1] == mask.shape:
            both = both * mask[..., None]
        total += both.sum(-2).double().square().sum(tuple(range(both.ndim - 2)))
