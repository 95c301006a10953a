"""Writes adapters into a copy of their base, with a verdict; saves nothing if rounding would lose them."""

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
from veneer.errors import ConfigError, NotMergeable, first_few, option
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
    """Saves the base with the adapters in its weights, in Hugging Face's layout, and returns the verdict.

    In a quantised base's own format, saves the quantised layers and the name of the model with the rest.

    adapter: FOLDER, NAME=FOLDER or FOLDER@STRENGTH; the changes of several are summed
    out: folder of the merged model, which must not exist
    model: base model [the one the adapters were made for]
    dtype: number format of the weights: fp32, bf16 or fp16; nf4, int8 or spqr for a base in that format
    limit: largest share of the change that rounding may take
    force: save even if more is lost
    allow: problems to let through when loading, see veneer.load
    """
    folder = Path(out)
    unpacked = None if dtype in FORMATS else dtypes.of_name(dtype, FORMATS)
    if not adapter:
        raise ConfigError("merge: name at least one adapter")
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
            f"{option('dtype', format)} is for layers in that format, which {first_few(others, 3)} are not;"
            f" use {option('dtype', 'bf16')}"
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
