"""`veneer merge`: adapters written into a copy of their base, with a verdict; nothing is saved if they were lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from veneer.adapt.files import making, write_json
from veneer.adapt.merge import Verdict, refusal
from veneer.adapt.merge import merge as merge_into
from veneer.app import adapted, pretrained
from veneer.errors import ConfigError, NotMergeable, suggest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    adapter: FOLDER, NAME=FOLDER or FOLDER@STRENGTH; may be given several times, whose changes are summed
    out: folder of the merged model; must not exist
    model: the base; the one that the adapters were made for unless given
    dtype: of the merged weights: float32, bfloat16 or float16
    limit: largest share of the change that rounding may take
    force: save even if more is lost
    allow: what to let through when loading, see veneer.load
    """
    folder = Path(out)
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}{suggest(dtype, DTYPES)}")
    if not adapter:
        raise ConfigError("nothing to merge: name at least one adapter")
    if folder.exists():
        raise ConfigError(f"out {folder} exists; choose another folder or remove it")
    opened, wanted = adapted.open_all(adapter, model=model, dtype=DTYPES[dtype], allow=allow)
    strengths = adapted.summed(wanted)
    verdict = merge_into(opened.model, strengths, limit=limit, force=True)  # this copy is thrown away, and need not be undone
    if verdict.lost and not force:
        raise NotMergeable(refusal(verdict))
    _save(opened, folder, {"merged": [str(a) for a in adapter], "base": opened.base, **verdict.as_dict()})
    return verdict


def _save(opened: adapted.Opened, folder: Path, record: dict[str, Any]) -> None:
    with making(folder) as temporary:
        with pretrained.no_bars():
            opened.model.save_pretrained(temporary)  # type: ignore[operator]
        opened.tokenizer.save_pretrained(temporary)
        write_json(temporary / "merge.json", record)
