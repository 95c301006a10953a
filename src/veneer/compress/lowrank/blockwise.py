"""Compresses a model block by block: survey, ranks, then each block on what the compressed ones before it
give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.compress.folder import described, put_layers
from veneer.compress.lowrank import plan
from veneer.compress.lowrank.anchored import replace_in_order
from veneer.compress.lowrank.candidates import Candidate, biased, candidates
from veneer.compress.lowrank.moments import Moments, Watch
from veneer.compress.lowrank.plan import Cut, Size
from veneer.compress.lowrank.recipe import Recipe
from veneer.compress.lowrank.refine import Pairs, refine
from veneer.compress.lowrank.sources import Source
from veneer.compress.lowrank.survey import inputs_metric, survey
from veneer.compress.lowrank.walk import Batch, Entered
from veneer.compress.lowrank.work import Work
from veneer.compress.places import Places
from veneer.errors import SiteError, first_few
from veneer.ops.matrix.linalg import precise
from veneer.ops.matrix.whitening import decompose
from veneer.sites import Site
from veneer.sites.factored.layers import Factored, holding

Say = Callable[[str], None]


@dataclass
class Job:
    """A compression of the source's blocks by a recipe on batches, kept in the work folder.

    dtype: of what is kept. surveys: the folder of the survey, which does not depend on keep; the work folder
    unless given.
    """

    source: Source
    batches: Sequence[Batch]
    recipe: Recipe
    work: Work
    dtype: torch.dtype
    seed: int = 0
    say: Say = lambda text: None
    surveys: Work | None = None

    def run(self) -> dict[str, Cut]:
        """Finishes every block in the work folder, and returns each layer's cut by its name in the model."""
        sizes = self._sizes()
        if self.recipe.surveys:
            self.say(f"surveying {len(self.source)} blocks")
            survey(self.source, self.batches, self.recipe, self.seed, self.surveyed)
        cuts = self._ranks(sizes)
        self._blocks(cuts)
        return cuts

    @property
    def surveyed(self) -> Work:
        """The folder that holds the survey."""
        return self.surveys or self.work

    def _sizes(self) -> dict[str, Size]:
        """Every layer's size. Raises SiteError for weights that are not finite."""
        found, bad = {}, []
        for i, name in enumerate(self.source.walk.names):
            with self.source.block(i) as block:
                for n, site in self.source.sites(i, block).items():
                    found[f"{name}.{n}"] = Size(site.out, site.in_, biased(site.module))
                    if not bool(torch.isfinite(site.weight()).all()):
                        bad.append(f"{name}.{n}")
        if bad:
            raise SiteError(f"NaN or infinity in the weights of {first_few(bad)}; is the checkpoint whole?")
        return found

    def _ranks(self, sizes: Mapping[str, Size]) -> dict[str, Cut]:
        if self.recipe.allocate == "uniform":
            return plan.uniform(sizes, self.recipe)
        losses: dict[str, list[tuple[Tensor, bool]]] = {}
        for i, names in enumerate(self.source.names):
            held = self.surveyed.get(f"survey-{i:03}")
            for n in names:
                own = candidates(held, n)
                losses[f"{self.source.walk.names[i]}.{n}"] = [(c.losses, c.mean is not None) for c in own]
        return plan.by_loss(sizes, losses, self.recipe)

    def _blocks(self, cuts: Mapping[str, Cut]) -> None:
        """Compresses the blocks that are not finished, and passes both streams of hidden states on."""
        entered = [self.source.walk.enter(b) for b in self.batches]
        here = there = [
            e.hidden for e in entered
        ]  # through the original blocks, and through the compressed ones
        for i, name in enumerate(self.source.walk.names):
            with self.source.block(i) as block, torch.no_grad():
                targets = [e.run(i, block, x) for e, x in zip(entered, here, strict=True)]
                own = {n: cuts[f"{name}.{n}"] for n in self.source.names[i]}
                key = f"block-{i:03}"
                if not self.work.has(key):
                    small, record = self._compressed(i, block, own, entered, here, there, targets)
                    self.work.put(key, as_kept(small, self.dtype), record)
                    self.say(told(name, record))
                small = opened(block, self.work.record(key), self.work.get(key))
                there = [e.run(i, small, x) for e, x in zip(entered, there, strict=True)]
            here = targets

    def _compressed(
        self,
        i: int,
        block: nn.Module,
        cuts: Mapping[str, Cut],
        entered: Sequence[Entered],
        here: Sequence[Tensor],
        there: Sequence[Tensor],
        targets: Sequence[Tensor],
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of the block with factored layers, refined, and the record of it."""
        sites = self.source.sites(i, block)
        small = copy.deepcopy(block)
        places = Places(small)

        def put(n: str, candidate: Candidate) -> None:
            rank = cuts[n].rank
            if rank is not None:
                places.put(small.get_submodule(n), candidate.layer(sites[n], rank, "plain"))

        if self.recipe.anchored:
            metrics = self._output_metrics(i, sites)
            replace_in_order(i, block, small, sites, entered, (here, there), self.recipe, metrics, put)
        else:
            for n, candidate in self._candidates(i, block, sites, cuts, entered, here).items():
                put(n, candidate)
        record: dict[str, Any] = {}
        if self.recipe.refine:  # two plain factors are better conditioned than the pivoted form
            how: dict[str, Any] = dict(epochs=self.recipe.refine, rate=self.recipe.rate, seed=self.seed)
            before, after = refine(small, Pairs(i, entered, there, targets), **how)
            record["error"] = {"before": before, "after": after}
        stored(small, self.recipe.storage)
        record["before"] = sum(s.out * s.in_ for s in sites.values())
        record["after"] = sum(_numbers(small.get_submodule(n)) for n in sites)
        record["layers"] = {n: described(m) for n, m in small.named_modules() if isinstance(m, Factored)}
        return small, record

    def _output_metrics(self, i: int, sites: Mapping[str, Site]) -> dict[str, Tensor | None]:
        """The metric R of each layer's outputs that the survey kept, None without one."""
        if not self.recipe.surveys:
            return dict.fromkeys(sites)
        held = self.surveyed.get(f"survey-{i:03}")
        return {n: held[f"{n}|R"] for n in sites}

    def _candidates(
        self,
        i: int,
        block: nn.Module,
        sites: Mapping[str, Site],
        cuts: Mapping[str, Cut],
        entered: Sequence[Entered],
        here: Sequence[Tensor],
    ) -> dict[str, Candidate]:
        """The candidate that each layer's cut names: from the survey, or from the inputs' moments."""
        if self.recipe.surveys:
            held = self.surveyed.get(f"survey-{i:03}")
            return {n: candidates(held, n)[cuts[n].variant] for n in sites}
        watch = Watch(sites)
        if self.recipe.metric != "weights":
            for e, x in zip(entered, here, strict=True):
                with watch.over(e.mask):
                    e.run(i, block, x)
        return {n: alone(s, watch.inputs.get(n), self.recipe) for n, s in sites.items()}


def stored(block: nn.Module, form: str) -> None:
    """Puts the block's factored layers into another form."""
    places = Places(block)
    for old in [m for m in block.modules() if isinstance(m, Factored) and m.form != form]:
        A, B = old.factors()
        made = holding(form, A, B, None if old.bias is None else old.bias.detach())
        made.transposed, made.added_bias = old.transposed, old.added_bias
        places.put(old, made.train(old.training))


def _numbers(layer: nn.Module) -> int:
    """Parameters of a layer, of biases those alone that the compression added."""
    counted = sum(p.numel() for p in layer.parameters())
    bias = getattr(layer, "bias", None)
    return counted - (bias.numel() if bias is not None and not getattr(layer, "added_bias", False) else 0)


def alone(site: Site, inputs: Moments | None, recipe: Recipe) -> Candidate:
    """Returns the directions of one layer in a metric that needs no gradients."""
    W, wide = site.weight().detach(), precise(site.weight()).dtype
    if recipe.metric == "weights" or inputs is None:
        parts, mean = decompose(W), None
    else:
        mean = inputs.mean if recipe.adds_bias else None
        parts = decompose(W, inputs_metric(inputs, centred=recipe.adds_bias))
    return Candidate.of(parts, parts.S.square(), mean, wide)


def as_kept(block: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the block's state dict in the dtype that is kept."""
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in block.state_dict().items()}


def opened(block: nn.Module, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Returns a copy of the block with the layers and weights that were kept, in the block's dtype."""
    small = copy.deepcopy(block)
    wide = next(p.dtype for p in block.parameters())
    put_layers(small, dict(record), wide)
    small.load_state_dict(
        {n: t.to(wide) if t.is_floating_point() else t for n, t in tensors.items()}, assign=True
    )
    return small.requires_grad_(False)


def told(name: str, record: Mapping[str, Any]) -> str:
    """Returns one line on a finished block."""
    ranks = ", ".join(f"{n.rsplit('.', 1)[-1]} {e['rank']}" for n, e in record["layers"].items())
    error = record.get("error")
    refined = f"; error {error['before']:.4f} -> {error['after']:.4f}" if error else ""
    return f"{name}: {ranks or 'dense'}{refined}"
