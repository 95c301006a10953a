"""`veneer merge`: adapters written into a copy of their base, with a verdict; nothing is saved if they were lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import dtypes
from veneer.adapt.attached import layers
from veneer.adapt.merge import Verdict, refusal
from veneer.adapt.merge import merge as merge_into
from veneer.compress import folder as compressed
from veneer.compress import store
from veneer.compress.quantise import dequantise
from veneer.errors import ConfigError, NotMergeable, first_few
from veneer.files import check_new, making, write_json
from veneer.models import adapted, pretrained
from veneer.ops.quant import FORMATS
from veneer.sites import changed
from veneer.sites.factored.site import factored_forms
from veneer.sites.quantised import formats


def merge(
    adapter: Sequence[str],
    *,
    out: str,
    model: str | None = None,
    dtype: str = "bfloat16",
    limit: float = 0.5,
    force: bool = False,
    allow: Sequence[str] = (),
) -> Verdict:
    """Saves the base with the adapters added to its weights, in Hugging Face's layout, and returns the verdict.

    In a quantised base's own format only the quantised layers are saved, which name the model that the rest comes from.

    adapter: FOLDER, NAME=FOLDER or FOLDER@STRENGTH; may be given several times, whose changes are summed
    out: folder of the merged model; must not exist
    model: the base; the one that the adapters were made for unless given
    dtype: of the merged weights: fp32, bf16 or fp16; for a quantised base also its own format, nf4 or int8
    limit: largest share of the change that rounding may take
    force: save even if more is lost
    allow: what to let through when loading, see veneer.load
    """
    folder = Path(out)
    unpacked = None if dtype in FORMATS else dtypes.of_name(dtype, FORMATS)
    if not adapter:
        raise ConfigError("nothing to merge: name at least one adapter")
    check_new(folder)
    opened, wanted = adapted.open_all(adapter, model=model, dtype=unpacked or torch.bfloat16, allow=allow)
    if unpacked is None:
        _check_packed(opened.model, dtype)
    else:
        dequantise(opened.model, unpacked)
    strengths = adapted.summed(wanted)
    # force: this copy is thrown away, so a lossy merge need not be undone
    verdict = merge_into(opened.model, strengths, limit=limit, force=True)
    if verdict.lost and not force:
        raise NotMergeable(refusal(verdict, packed=dtype in FORMATS))
    _save(opened, folder, {"merged": [str(a) for a in adapter], "base": opened.base, **verdict.as_dict()})
    return verdict


def text(verdict: Verdict) -> str:
    """Returns the verdict for people."""
    return str(verdict)


def _check_packed(model: nn.Module, format: str) -> None:
    """Raises ConfigError unless every changed layer of the model is one in this format."""
    there = formats(model)
    others = [d.site.name for d in layers(model) if there.get(d.site.name) != format or not d.site.is_packed]
    if others:
        raise ConfigError(
            f"dtype {format!r} is for layers that are in it already, and {first_few(others, 3)} are not; use bfloat16"
        )


def _save(opened: adapted.Opened, folder: Path, record: dict[str, Any]) -> None:
    with making(folder) as temporary:
        if formats(opened.model):
            store.save_quantised(opened.model, temporary, changed.origin(opened.base))
        elif factored_forms(opened.model):
            compressed.write(opened.model, temporary, tokenizer=opened.tokenizer)
        else:
            with pretrained.no_bars():
                opened.model.save_pretrained(temporary)  # type: ignore[operator]
            opened.tokenizer.save_pretrained(temporary)
        write_json(temporary / "merge.json", record)
