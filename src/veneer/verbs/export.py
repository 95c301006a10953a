"""Exports a base with adapters in its weights as a folder or a GGUF file, if it reloads the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer import dtypes
from veneer.adapt.merge import Verdict, foresee, outputs, refusal
from veneer.adapt.merge import merge as merge_into
from veneer.adapt.probe import TOLERANCE
from veneer.adapt.probe_inputs import default_inputs
from veneer.adapt.switch import using
from veneer.compress.quantise import dequantise
from veneer.errors import ConfigError, NotMergeable, first_few, option
from veneer.files import making, unusable, write_json
from veneer.models import adapted, pretrained
from veneer.models.expand import expand
from veneer.units import size
from veneer.verbs.gguf import model as gguf_model
from veneer.verbs.gguf import modelfile

SIZE = re.compile(r"\d+(\.\d+)?([KMGT]i?)?B")  # as save_pretrained reads it
RECORD = "export.json"


@dataclass(frozen=True)
class Exported:
    """A written folder.

    off: largest difference of the reloaded folder's outputs from those of base and adapters, over the largest
    output, None for models that take no token ids; allowed: its limit in `dtype`.
    """

    folder: str
    dtype: str
    base: str
    adapters: dict[str, float]
    verdict: Verdict
    off: float | None
    allowed: float

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict.as_dict()}


def export(
    base: str,
    *,
    out: str,
    adapter: Sequence[str] = (),
    format: Literal["folder", "gguf"] = "folder",
    dtype: str = "auto",
    shard_size: str = "2GB",
    limit: float = 0.5,
    force: bool = False,
    allow: Sequence[str] = (),
) -> Exported:
    """Saves the base with the adapters in its weights and the tokenizer, and returns a verdict.

    Adds in float32, rounds once and reloads. Raises NotMergeable, with nothing written, if that loses them.

    base: base model: a Hugging Face folder or id, or builtin
    out: folder of the new model, which must not exist
    adapter: FOLDER, NAME=FOLDER or FOLDER@STRENGTH; the changes of several are summed
    format: Hugging Face folder, or a GGUF file with a Modelfile for Ollama
    dtype: number format of the weights: fp32, bf16, fp16, or auto for that of the base
    shard_size: largest file of weights, such as 500MB
    limit: largest share of the change, and of its effect, that rounding may take
    force: save even if more is lost
    allow: problems to let through when loading, see veneer.load
    """
    name = _checked(adapter, out, shard_size, dtype, base)
    opened, wanted = adapted.open_all(adapter, model=base, allow=allow)
    expand(dequantise(opened.model))
    verdict = foresee(opened.model, strengths := adapted.summed(wanted), limit, dtype=dtypes.NAMES[name])
    _refuse(verdict, force)
    before = _merged(opened.model, strengths, name, inputs := default_inputs(opened.model))
    with making(Path(out)) as folder:
        if format == "gguf":
            _save_gguf(opened, folder, name)
        else:
            _save(opened, folder, shard_size)
        del opened  # one model at a time in memory
        verdict, off = _reloaded(folder, verdict, inputs, before) if inputs and before else (verdict, None)
        return _concluded(Exported(out, name, base, strengths, verdict, off, _tolerance(name)), folder, force)


def _concluded(found: Exported, folder: Path, force: bool) -> Exported:
    """Writes the record, and returns the export. Raises NotMergeable if it differs."""
    _refuse_difference(found, force)
    write_json(folder / RECORD, found.as_dict())
    return found


def _checked(adapter: Sequence[str], out: str, shard_size: str, dtype: str, base: str) -> str:
    """Returns the name of the number format. Raises ConfigError for all problems of the arguments."""
    problems = [] if adapter else ["nothing to export: name at least one adapter"]
    if problem := unusable(Path(out)):
        problems.append(problem)
    if not SIZE.fullmatch(shard_size) or not float(re.split("[A-Z]", shard_size)[0]):
        wrong = f"{option('shard_size')} must be a size with its unit, such as 500MB, got {shard_size!r}"
        problems.append(wrong)
    if problems:
        raise ConfigError("\n".join(problems))
    wanted = None if dtype == "auto" else dtypes.of_name(dtype, ("auto",))
    return dtypes.short(wanted or pretrained.config(base).dtype) or "fp32"


def _refuse(verdict: Verdict, force: bool) -> None:
    if verdict.lost and not force:
        raise NotMergeable(refusal(verdict, packed=False))


def _refuse_difference(found: Exported, force: bool) -> None:
    """Raises NotMergeable if reloaded outputs lack the adapters or differ beyond rounding."""
    _refuse(found.verdict, force)
    if found.off is not None and not found.off <= found.allowed and not force:
        raise NotMergeable(
            f"the exported model differs from base and adapters: its outputs are off by {found.off:.2g}, of"
            f" which {found.dtype} explains {found.allowed:g};"
            f" use {option('dtype', 'fp32')} or {option('force', True)}"
        )


def _tolerance(name: str) -> float:
    return TOLERANCE[str(dtypes.NAMES[name]).removeprefix("torch.")]


def _merged(
    model: nn.Module, strengths: Mapping[str, float], name: str, inputs: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor] | None:
    """Merges the adapters and converts the model; returns its outputs without and with them, before."""
    before = _both(model, strengths, inputs) if inputs else None
    merge_into(model, strengths, probe={}, force=True)
    _narrow(model, name)
    return before


def _both(
    model: nn.Module, strengths: Mapping[str, float], inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Returns the outputs of the base alone, and those with the adapters."""
    with using(model):
        plain = outputs(model, inputs)
    with using(model, strengths):
        return plain, outputs(model, inputs)


def _narrow(model: nn.Module, name: str) -> None:
    """Converts the model to that number format. Raises NotMergeable for tensors that exceed its range."""
    most = torch.finfo(dtypes.NAMES[name]).max
    beyond = list(_beyond(model, most))
    if beyond:
        raise NotMergeable(
            f"{len(beyond)} tensors exceed {name}'s range (at most {most:g}): {first_few(beyond)};"
            f" use {option('dtype', 'bf16')} or {option('dtype', 'fp32')}"
        )
    model.to(dtypes.NAMES[name])


def _beyond(model: nn.Module, most: float) -> Iterator[str]:
    for name, t in model.state_dict().items():
        if t.is_floating_point() and t.numel() and not float(t.abs().max()) <= most:
            yield f"{name} (up to {float(t.abs().max()):.4g})"


def _save(opened: adapted.Opened, folder: Path, shard_size: str) -> None:
    """Saves through save_pretrained, which alone knows the names of a model's weights in files."""
    with pretrained.no_bars():
        opened.model.save_pretrained(folder, max_shard_size=shard_size)  # type: ignore[operator]
    opened.tokenizer.save_pretrained(folder)


def _save_gguf(opened: adapted.Opened, folder: Path, name: str) -> None:
    """Writes one GGUF file and an Ollama Modelfile."""
    gguf_model.write(opened.model, opened.tokenizer, folder / gguf_model.FILE, name, Path(opened.base).name)
    written = modelfile.text(opened.tokenizer, gguf_model.FILE)
    (folder / "Modelfile").write_text(written, encoding="utf-8")


def _reloaded(
    folder: Path, verdict: Verdict, inputs: Mapping[str, Any], before: tuple[Tensor, Tensor]
) -> tuple[Verdict, float]:
    """Returns the verdict with the effect on the reloaded model's outputs, and their error."""
    plain, wanted = before
    if (folder / gguf_model.FILE).exists():
        with pretrained.no_bars():
            again = gguf_model.reloaded(folder)
    else:
        again = pretrained.causal_lm(str(folder), torch.float32, torch.device("cpu"))
    y = outputs(again, inputs)
    off, effect = y - wanted, float((wanted - plain).norm())
    logit_error = float(off.norm()) / effect if effect else 1.0
    return replace(verdict, logit_error=logit_error), float(off.abs().max() / wanted.abs().max())


def text(found: Exported) -> str:
    """Returns the export for people."""
    files = sorted(p for p in Path(found.folder).iterdir() if p.suffix in (".safetensors", ".gguf"))
    written = size(sum(f.stat().st_size for f in files))
    lines = [str(found.verdict)]
    if found.off is not None:
        allowed = f"{found.allowed:g} allowed in {found.dtype}"
        lines.append(f"reloaded: outputs differ by {found.off:.2g} from base and adapters ({allowed})")
    n = f"{len(files)} file" if len(files) == 1 else f"{len(files)} files"
    return "\n".join([*lines, f"saved in {found.folder}: {found.dtype}, {written} in {n}"])
