"""Puts the finished blocks of a compression into one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer import files
from veneer.compress import folder as folders
from veneer.compress.compress import Compressed
from veneer.compress.lowrank.blockwise import Job
from veneer.compress.lowrank.sources import Source
from veneer.data.tokenizer import Tokenizer
from veneer.models import pretrained
from veneer.models.compressed import load_compressed
from veneer.models.expand import expand as dense

STEM = Path(folders.TENSORS).stem


def assemble(
    job: Job, found: Compressed, out: Path, tokenizer: Tokenizer, model: str, *, expand: bool
) -> None:
    """Writes the folder, whole or not at all: layers factored, or multiplied out if `expand`.

    Raises ConfigError for biases that dense layers of the model have no place for.
    """
    with files.making(out) as temporary:
        config = pretrained.config(model)
        config.dtype = job.dtype
        job.source.model.config = config
        folders.write_beside(job.source.model, temporary, tokenizer)
        layers = _tensors(job, temporary)
        record = {
            "method": found.method,
            "settings": found.settings,
            "kept": found.kept,
            "predicted": found.predicted,
        }
        folders.describe(temporary, layers, model, {**record, "seed": job.seed, "errors": found.errors})
        if expand:
            made = dense(load_compressed(temporary))
            for path in [*temporary.glob(f"{STEM}*")]:
                path.unlink()
            with pretrained.no_bars():
                made.save_pretrained(temporary)  # type: ignore[operator]


def _tensors(job: Job, folder: Path) -> dict[str, dict[str, Any]]:
    """Writes a file for the weights outside the blocks and one for each block; returns the factored
    layers."""
    outside = {n: t.to(job.dtype) if t.is_floating_point() else t for n, t in job.source.outside().items()}
    files.write_tensors(folder / f"{STEM}-outside.safetensors", outside)
    layers: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(job.source.walk.names):
        held = job.work.get(f"block-{i:03}")
        files.write_tensors(
            folder / f"{STEM}-{i:03}.safetensors", {f"{name}.{n}": t for n, t in held.items()}
        )
        layers |= {f"{name}.{n}": e for n, e in job.work.record(f"block-{i:03}")["layers"].items()}
    return layers


def model_numbers(source: Source) -> int:
    """Returns the parameters of the whole model before compression, shared ones once."""
    return sum({id(p): p.numel() for p in source.model.parameters()}.values())
