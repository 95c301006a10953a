"""Measures an adapter's change of each layer, and whether a merge would keep it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from veneer.adapt.attached import changes, n_base_parameters
from veneer.adapt.merge import foresee
from veneer.adapt.store.manifest import method_of
from veneer.analyse.spectra import Spectrum, spectra
from veneer.errors import ConfigError
from veneer.models import adapted

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Inspection:
    """One adapter on its base. merge: share of the change that rounding would take, by dtype."""

    name: str
    folder: str
    base: str
    method: str
    parameters: int
    base_parameters: int
    strength: float
    layers: list[Spectrum]
    merge: dict[str, float]
    survives: dict[str, bool]

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "layers": [s.as_dict() for s in self.layers]}


def inspect(adapter: str, *, model: str | None = None, allow: Sequence[str] = ()) -> Inspection:
    """Returns the adapter's layers, ranks, norms and effective ranks, and the cost of a merge into 16 bits.

    adapter: FOLDER, NAME=FOLDER or FOLDER@STRENGTH
    model: base model [the one the adapter was made for]
    allow: problems to let through when loading, see veneer.load
    """
    opened, (wanted,) = adapted.open_all([adapter], model=model, allow=allow)
    if wanted.strength == 0:
        raise ConfigError(f"adapter {adapter}: strength must not be 0; there would be no change to inspect")
    found = changes(opened.model, wanted.name)
    verdicts = {word: _foreseen(opened.model, wanted, dtype) for word, dtype in NARROW.items()}
    return Inspection(
        name=wanted.name,
        folder=str(wanted.folder),
        base=opened.base,
        method=", ".join(dict.fromkeys(method_of(d) for _, d in found)),
        parameters=sum(p.numel() for _, d in found for p in d.parameters()),
        base_parameters=n_base_parameters(opened.model),
        strength=wanted.strength,
        layers=spectra(opened.model, wanted.name),
        merge={word: verdict.error for word, verdict in verdicts.items()},
        survives={word: not verdict.lost for word, verdict in verdicts.items()},
    )


def _foreseen(model: nn.Module, wanted: adapted.Wanted, dtype: torch.dtype) -> Any:
    return foresee(model, {wanted.name: wanted.strength}, dtype=dtype)


def text(found: Inspection) -> str:
    """Returns the inspection as a table for people."""
    share = f"{found.parameters / found.base_parameters:.1%} of the base's {found.base_parameters:,}"
    lines = [
        f"{found.name}: {found.method} on {found.base}, {found.parameters:,} numbers ({share})",
        "",
        f"{'layer':<44} {'rank':>5} {'effective':>9} {'for 90 %':>8} {'norm':>9} {'of W':>7}",
    ]
    for s in found.layers:
        ranks = f"{s.rank:>5} {s.effective_rank:>9.1f} {s.energy_rank:>8}"
        lines.append(f"{s.site[-44:]:<44} {ranks} {s.norm:>9.3g} {s.relative:>7.1%}")
    lines.append("")
    for dtype, error in found.merge.items():
        verdict = "survives" if found.survives[dtype] else "would be LOST"
        lines.append(f"merged into {dtype}: {verdict}, rounding takes {error:.1%} of the change")
    return "\n".join(lines)
