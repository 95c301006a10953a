"""Makes adapters from adapters, and from two checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from veneer.adapt import combine as algebra
from veneer.adapt.combine import Cut
from veneer.adapt.store import store
from veneer.files import check_new
from veneer.models import adapted, pretrained

NEW = "made"


def combine(
    adapter: Sequence[str],
    *,
    out: str,
    rank: int | None = None,
    energy: float | None = None,
    how: str = "sum",
    density: float = 0.5,
    seed: int = 0,
    model: str | None = None,
    allow: Sequence[str] = (),
) -> dict[str, Any]:
    """Saves one plain LoRA adapter equal to the sum of others, and returns the loss of its cut by layer.

    adapter: FOLDER, NAME=FOLDER or FOLDER@WEIGHT; several, or one to cut its rank or to make it plain LoRA
    out: folder of the new adapter, which must not exist
    rank: rank to cut each layer to
    energy: share of each layer's squared norm to keep, such as 0.9
    how: way to combine: sum (exact), ties (weighted mean), ties-scaled (weights scale it) or dare
    density: share of numbers that ties, ties-scaled and dare keep
    seed: seed of the numbers that dare drops
    model: base model [the one the adapters were made for]
    allow: problems to let through when loading, see veneer.load
    """
    check_new(out)
    opened, wanted = adapted.open_all(adapter, model=model, allow=allow)
    cuts = algebra.combine(
        opened.model,
        adapted.summed(wanted),
        NEW,
        rank=rank,
        energy=energy,
        how=how,
        density=density,
        seed=seed,
    )
    store.save(opened.model, out, NEW)
    return _told(out, cuts)


def extract(
    tuned: str,
    *,
    base: str,
    out: str,
    rank: int | None = None,
    energy: float | None = None,
    to: Sequence[str] = (),
    rest: str = "refuse",
) -> dict[str, Any]:
    """Saves a fine-tuned model's change of its base as a LoRA adapter, and returns its loss by layer.

    tuned: fine-tuned model: a Hugging Face folder or id
    base: model that it was made from
    out: folder of the new adapter, which must not exist
    rank: rank to cut each layer to
    energy: share of each layer's squared norm to keep, such as 0.9
    to: names or endings of names of layers to take [all linear ones but the head]
    rest: other differences (embeddings, norms, head): refuse, keep (whole, beside the low-rank part) or drop
    """
    check_new(out)
    cpu = torch.device("cpu")
    before, after = (pretrained.causal_lm(name, torch.float32, cpu) for name in (base, tuned))
    cuts = algebra.extract(
        before, after, NEW, to=list(to) or "all-linear", rank=rank, energy=energy, rest=rest
    )
    store.save(before, out, NEW)
    return _told(out, cuts)


def _told(out: str, cuts: Sequence[Cut]) -> dict[str, Any]:
    return {"folder": out, "layers": [vars(c) for c in cuts]}


def text(found: dict[str, Any]) -> str:
    """Returns the cut of every layer as a table for people."""
    lines = [f"{'layer':<48} {'rank':>5} {'lost':>8}"]
    lines += [f"{c['site'][-48:]:<48} {c['rank']:>5} {c['error']:>8.2%}" for c in found["layers"]]
    return "\n".join([*lines, f"saved in {found['folder']}"])
