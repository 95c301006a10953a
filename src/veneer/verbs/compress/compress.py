"""`veneer compress`: a smaller model in a folder of its own, block by block."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from veneer import disk, dtypes, settings
from veneer.compress.compress import Compressed, check_data, outcome
from veneer.compress.lowrank.blockwise import Job
from veneer.compress.lowrank.recipe import Recipe, recipe
from veneer.compress.lowrank.sources import Held, Source
from veneer.compress.lowrank.work import Work
from veneer.errors import ConfigError, FormatError, NotWritten
from veneer.models import machine, pretrained
from veneer.models.streamed import Streamed
from veneer.sites import changed
from veneer.sites.finding.names import Target
from veneer.train.loop.progress import Voice
from veneer.units import size
from veneer.verbs.compress.assemble import assemble, model_numbers
from veneer.verbs.compress.calibration import Calibration, calibration
from veneer.verbs.compress.draw import Drawn, draw
from veneer.verbs.compress.options import Options


@dataclass(frozen=True)
class Written:
    """A compressed model's folder. bytes_, parameters: of the whole model, before and after."""

    folder: str
    model: str
    found: Compressed
    parameters: tuple[int, int]
    bytes_: tuple[int, int]

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "model": self.model,
            "parameters": list(self.parameters),
            "bytes": list(self.bytes_),
            **self.found.as_dict(),
        }


def compress(model: str, **given: Any) -> Written | Drawn:
    """Writes the model with linear layers of low rank into a folder that opens like any base.

    The same command goes on with an interrupted compression at its block.

    With curve=True it measures several ratios instead, and writes their table and picture.

    model: a Hugging Face folder or id, or builtin. given: settings of Options and of a Recipe.
    """
    own = {k: v for k, v in given.items() if k in settings.table(Options)}
    s = Options(**own)
    chosen = recipe(s.method, **{k: v for k, v in given.items() if k not in own})
    _check(s, model)
    if s.curve:
        return draw(model, s, {k: v for k, v in given.items() if k not in own})
    voice, where = Voice(s.progress), machine.device(s.device)
    source = opened(model, s.to, s.exclude, where)
    kept = source.dtype if s.dtype == "auto" else dtypes.of_name(s.dtype)
    chosen = _expandable(chosen, source) if s.expand else chosen
    texts = _texts(model, s, chosen, where)
    notes = check_data(texts.batches, chosen, source)
    for note in notes:
        voice.say(note)
    place = Path(f"{s.out}.work")
    stamp = {"model": model, "stamp": _stamp(model), "layers": source.names, "dtype": str(kept)}
    with full_disk(place):
        work = Work(place, {**chosen.as_dict(), **stamp, "texts": texts.sha256, "seed": s.seed}, where)
        job = Job(source, texts.batches, chosen, work, kept, s.seed, voice.say)
        found = outcome(s.method, chosen, job, job.run(), notes)
        before = model_numbers(source)
        assemble(job, found, Path(s.out), pretrained.tokenizer(model), model, expand=s.expand)
    shutil.rmtree(place)
    after = before if s.expand else before - found.before + found.after
    on_disk = sum(p.stat().st_size for p in Path(s.out).glob("*.safetensors"))
    return Written(s.out, model, found, (before, after), (before * kept.itemsize, on_disk))


def _check(s: Options, model: str) -> None:
    problems = []
    if Path(s.out).exists():
        problems.append(f"out {s.out} exists; choose another folder or remove it")
    if kind := changed.kind_of_folder(model):
        problems.append(f"model {model} is {kind.name} already; compress the model that it was made from")
    if problems:
        raise ConfigError("\n".join(problems))


def opened(model: str, to: Target, exclude: Target, device: torch.device) -> Source:
    """Returns the model, read block by block, or whole where the names in its files do not allow that."""
    folder = Path(pretrained.source(model))
    if folder.is_dir():
        try:
            return Streamed(folder, to, exclude, device)
        except FormatError:
            pass  # other names in the files: transformers knows how to read them
    return Held(pretrained.causal_lm(model, torch.float32, device), to, exclude)


def _expandable(chosen: Recipe, source: Source) -> Recipe:
    """The recipe without biases that the model's own layers lack, which dense weights have no place for."""
    without = any(not b for b in source.biased())
    if not without:
        return chosen
    if chosen.metric in ("outputs", "centred"):
        raise ConfigError(
            f"expand: metric={chosen.metric!r} adds biases, for which this model's layers have no place;"
            f" use metric='inputs', or write factored layers"
        )
    return replace(chosen, centre="never")


def _texts(model: str, s: Options, chosen: Recipe, device: torch.device) -> Calibration:
    if chosen.metric == "weights" and not chosen.refine and not s.data:
        return Calibration([], [], "")
    return calibration(model, s, pretrained.tokenizer(model), device)


def _stamp(model: str) -> dict[str, list[int]]:
    """Sizes and times of the model's files, by which a changed model is noticed."""
    folder = Path(pretrained.source(model))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}


@contextmanager
def full_disk(place: Path) -> Iterator[None]:
    """Within the block a full disk raises NotWritten; the finished blocks stay."""
    try:
        with disk.written(place):
            yield
    except NotWritten as e:
        raise NotWritten(f"{e.text}, which goes on from {place}") from None


def text(written: Written | Drawn) -> str:
    """Returns the outcome for people."""
    if isinstance(written, Drawn):
        return written.text
    found = written.found
    factored = sum(r is not None for r in found.layers.values())
    before, after = written.parameters
    lines = [
        f"{factored} of {len(found.layers)} layers factored by {found.method};"
        f" {found.kept:.1%} of their parameters kept ({found.after:,} of {found.before:,})",
        f"whole model: {after / before:.1%} of the parameters ({after:,}),"
        f" {size(written.bytes_[0])} -> {size(written.bytes_[1])}",
    ]
    lines += [f"note: {n}" for n in found.notes]
    return "\n".join(
        [*lines, f"saved in {written.folder}", f"next: veneer eval {written.folder} --data TEXT"]
    )
