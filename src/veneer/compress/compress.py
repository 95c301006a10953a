"""Compresses a model in memory by low rank, in place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.compress.folder import put_layers
from veneer.compress.lowrank.blockwise import Job
from veneer.compress.lowrank.plan import Cut
from veneer.compress.lowrank.recipe import Recipe, recipe
from veneer.compress.lowrank.sources import Held, Source
from veneer.compress.lowrank.walk import Batch, mask_of
from veneer.compress.lowrank.work import Work
from veneer.errors import ConfigError, first_few
from veneer.sites.finding.names import Target


@dataclass(frozen=True)
class Compressed:
    """Outcome of a compression. Parameters are counted in the compressed layers (their biases where they were
    added).

    layers: the rank of every layer by its name, None where it stays dense. left: layers outside the blocks.
    errors: of
    each refined block's outputs before and after. notes: what to keep in mind.

    """

    method: str
    settings: dict[str, Any]
    before: int
    after: int
    layers: dict[str, int | None]
    predicted: float
    left: list[str]
    errors: dict[str, dict[str, float]]
    notes: list[str]

    @property
    def kept(self) -> float:
        """The share of the compressed layers' parameters that is left."""
        return self.after / self.before

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kept": self.kept}


def compress(
    model: nn.Module,
    method: str = "auto",
    *,
    keep: float = 0.8,
    data: Iterable[Batch] = (),
    to: Target = "all-linear",
    exclude: Target = (),
    seed: int = 0,
    folder: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Compressed:
    """Replaces the model's linear layers by factored ones that keep a share of their parameters.

    method: svd, lord, svd-llm, anchored, allocate, refine, fast, auto, .., see lowrank.recipe
    data: keyword arguments of calls with input_ids; attention_mask or labels tell padding
    folder: keeps finished blocks until the end; a later call with the same settings goes on there
    say: called with a line of text for every finished block
    settings: of the recipe, in place of the method's own

    Raises ConfigError and SiteError, before anything is changed, for what cannot be used.

        veneer.compress(model, keep=0.8, data=batches)
    """
    chosen, batches = recipe(method, keep, **settings), list(data)
    source = Held(model, to, exclude)
    notes = check_data(batches, chosen, source)
    with tempfile.TemporaryDirectory() as own:
        place = Path(own) if folder is None else Path(folder)
        settings = {**chosen.as_dict(), "seed": seed, "batches": len(batches)}
        work = Work(place, settings, next(model.parameters()).device)
        job = Job(source, batches, chosen, work, source.dtype, seed, say)
        cuts = job.run()
        found = outcome(method, chosen, job, cuts, notes)
        put_blocks(source, work)
    return found


def put_blocks(source: Source, work: Work) -> None:
    """Puts the finished blocks of the work folder into the source's model."""
    for i, block in enumerate(source.walk.blocks):
        _put(block, work.record(f"block-{i:03}"), work.get(f"block-{i:03}"))


def _put(block: nn.Module, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts a finished block's layers and weights in place of the block's own."""
    device = next(block.parameters()).device
    dtype = next(p.dtype for p in block.parameters() if p.is_floating_point())
    put_layers(block, dict(record), dtype)
    block.load_state_dict({n: t.to(device) for n, t in tensors.items()}, assign=True)


def check_data(batches: Sequence[Batch], chosen: Recipe, source: Source) -> list[str]:
    """Returns what to keep in mind about the calibration. Raises ConfigError without texts where some are
    needed.
    """
    if not batches and (chosen.metric != "weights" or chosen.refine or chosen.anchored):
        raise ConfigError(
            f"data: metric={chosen.metric!r} and refinement need texts; give some, or use method='svd'"
        )
    tokens = sum(_tokens(b) for b in batches)
    widest = max(s.in_ for i, block in enumerate(source.walk.blocks) for s in source.sites(i, block).values())
    notes = []
    if batches and tokens < widest and chosen.metric != "weights":
        notes.append(
            f"{tokens:,} calibration tokens are fewer than the widest layer's {widest:,} inputs:"
            f" their moments are regularised; give {8 * widest:,} or more"
        )
    if source.left:
        notes.append(f"{len(source.left)} layers outside the blocks stay dense: {first_few(source.left)}")
    return notes


def _tokens(batch: Batch) -> int:
    mask = mask_of(batch)
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def outcome(method: str, chosen: Recipe, job: Job, cuts: Mapping[str, Cut], notes: list[str]) -> Compressed:
    """Returns the outcome of a finished job."""
    before = after = 0
    errors = {}
    for i, name in enumerate(job.source.walk.names):
        record = job.work.record(f"block-{i:03}")
        before += record["before"]
        after += record["after"]
        if "error" in record:
            errors[name] = record["error"]
    return Compressed(
        method=method,
        settings=chosen.as_dict(),
        before=before,
        after=after,
        layers={n: c.rank for n, c in cuts.items()},
        predicted=sum(c.loss for c in cuts.values()),
        left=job.source.left,
        errors=errors,
        notes=notes,
    )
