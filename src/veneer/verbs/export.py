"""`veneer export`: a base with adapters in its weights as one Hugging Face folder, kept only if it reloads to the same outputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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

SIZE = re.compile(r"\d+(\.\d+)?([KMGT]i?)?B")  # as save_pretrained reads it
RECORD = "export.json"


@dataclass(frozen=True)
class Exported:
    """What was written. off: how far the reloaded folder's outputs are from those of base and adapters, relative to the
    largest of them; allowed: what `dtype` may make of that; None where the model takes no token ids."""

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
    dtype: str = "auto",
    shard_size: str = "2GB",
    limit: float = 0.5,
    force: bool = False,
    allow: Sequence[str] = (),
) -> Exported:
    """Saves the base with the adapters in its weights as a model folder, with tokenizer, and returns what survived in it.

    Sums are made in float32 and rounded once. The folder is reloaded before it gets its name. Raises NotMergeable, with
    nothing written, if the adapters or a tensor would be lost in `dtype`, or the reloaded model does something else.

    base: the base model: a Hugging Face folder or id, or builtin
    out: folder of the new model; must not exist
    adapter: FOLDER, NAME=FOLDER or FOLDER@STRENGTH; may be given several times, whose changes are summed
    dtype: of the weights: fp32, bf16, fp16, or auto, the dtype of the stored base
    shard_size: largest file of weights, such as 500MB
    limit: largest share of the change, and of its effect on the outputs, that rounding may take
    force: save even if more is lost
    allow: what to let through when loading, see veneer.load
    """
    _check(adapter, out, shard_size)
    wanted_dtype = None if dtype == "auto" else dtypes.of_name(dtype, ("auto",))
    name = dtypes.short(wanted_dtype or pretrained.config(base).dtype) or "fp32"
    opened, wanted = adapted.open_all(adapter, model=base, allow=allow)
    expand(dequantise(opened.model))
    strengths = adapted.summed(wanted)
    verdict = foresee(opened.model, strengths, limit, dtype=dtypes.NAMES[name])
    _refuse(verdict, force)
    inputs = default_inputs(opened.model)
    before = _both(opened.model, strengths, inputs) if inputs else None
    merge_into(opened.model, strengths, probe={}, force=True)
    _narrow(opened.model, name)
    with making(Path(out)) as folder:
        _save(opened, folder, shard_size)
        del opened  # one model at a time in memory
        verdict, off = _reloaded(folder, verdict, inputs, before) if inputs and before else (verdict, None)
        allowed = TOLERANCE[str(dtypes.NAMES[name]).removeprefix("torch.")]
        found = Exported(out, name, base, strengths, verdict, off, allowed)
        _refuse(verdict, force)
        if off is not None and not off <= found.allowed and not force:
            raise NotMergeable(
                f"the exported model does something else than base and adapters: reloaded, its outputs are {off:.2g} off, and"
                f" {found.allowed:g} is what {name} explains; use {option('dtype', 'fp32')}, or pass {option('force', True)}"
            )
        write_json(folder / RECORD, found.as_dict())
    return found


def _check(adapter: Sequence[str], out: str, shard_size: str) -> None:
    problems = [] if adapter else ["nothing to export: name at least one adapter"]
    if problem := unusable(Path(out)):
        problems.append(problem)
    if not SIZE.fullmatch(shard_size) or not float(re.split("[A-Z]", shard_size)[0]):
        problems.append(
            f"shard_size {shard_size!r} is no size; write a number and KB, MB or GB, such as 500MB"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _refuse(verdict: Verdict, force: bool) -> None:
    if verdict.lost and not force:
        raise NotMergeable(refusal(verdict))


def _both(
    model: nn.Module, strengths: Mapping[str, float], inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The outputs of the base alone, and with the adapters."""
    with using(model):
        plain = outputs(model, inputs)
    with using(model, strengths):
        return plain, outputs(model, inputs)


def _narrow(model: nn.Module, name: str) -> None:
    """The model in that number format. Raises NotMergeable, naming them, for tensors with numbers beyond it."""
    most = torch.finfo(dtypes.NAMES[name]).max
    beyond = list(_beyond(model, most))
    if beyond:
        what = f"{len(beyond)} tensors have numbers that {name} has not (at most {most:g})"
        raise NotMergeable(f"{what}: {first_few(beyond)}; use bf16 or fp32")
    model.to(dtypes.NAMES[name])


def _beyond(model: nn.Module, most: float) -> Iterator[str]:
    for name, t in model.state_dict().items():
        if t.is_floating_point() and t.numel() and not float(t.abs().max()) <= most:
            yield f"{name} (up to {float(t.abs().max()):.4g})"


def _save(opened: adapted.Opened, folder: Path, shard_size: str) -> None:
    """Through save_pretrained, which alone knows the names that a model's weights have in files."""
    with pretrained.no_bars():
        opened.model.save_pretrained(folder, max_shard_size=shard_size)  # type: ignore[operator]
    opened.tokenizer.save_pretrained(folder)


def _reloaded(
    folder: Path, verdict: Verdict, inputs: Mapping[str, Any], before: tuple[Tensor, Tensor]
) -> tuple[Verdict, float]:
    """The verdict with the effect on the outputs, and how far off the outputs are, of what the files hold."""
    plain, wanted = before
    y = outputs(pretrained.causal_lm(str(folder), torch.float32, torch.device("cpu")), inputs)
    off, effect = y - wanted, float((wanted - plain).norm())
    logit_error = float(off.norm()) / effect if effect else 1.0
    return replace(verdict, logit_error=logit_error), float(off.abs().max() / wanted.abs().max())


def text(found: Exported) -> str:
    """What was exported, for people."""
    files = sorted(Path(found.folder).glob("*.safetensors"))
    written = size(sum(f.stat().st_size for f in files))
    told = [str(found.verdict)]
    if found.off is not None:
        told.append(
            f"reloaded: outputs are {found.off:.2g} from those of base and adapters ({found.allowed:g} allowed in {found.dtype})"
        )
    return "\n".join(
        [
            *told,
            f"saved in {found.folder}: {found.dtype}, {written} in {len(files)} file{'s' * (len(files) > 1)}",
        ]
    )
