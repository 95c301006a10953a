"""Lists the layers that a training changes, and their kinds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from veneer.adapt.attached import changes
from veneer.runs.prepare import NAME, Ready


class Layer(NamedTuple):
    """One adapted layer W (out, in).

    rank: None for methods without one; trained: trained numbers; share: trained numbers over those of W.
    """

    site: str
    out: int
    in_: int
    rank: int | None
    trained: int
    share: float


class Kind(NamedTuple):
    """Layers alike: `n_layers` of them under one name, the first as `layer`, `trained` numbers in all."""

    name: str
    n_layers: int
    layer: Layer
    trained: int


def layers(ready: Ready) -> list[Layer]:
    """Returns the adapted layers, or the parameters that full fine-tuning trains."""
    if ready.run.trains_base:
        return [
            Layer(p.name, p.parameter.shape[0], p.parameter[0].numel(), None, p.parameter.numel(), 1.0)
            for p in ready.parts
        ]
    found = []
    for site, delta in changes(ready.model, NAME):
        trained = sum(p.numel() for p in delta.parameters())
        form = delta.factors(site)
        rank = None if form is None else form.A.shape[0]
        found.append(Layer(site.name, site.out, site.in_, rank, trained, trained / (site.out * site.in_)))
    return found


def kinds(found: Iterable[Layer]) -> list[Kind]:
    """Returns the layers by kind: those of one name in all blocks, with one shape and one rank, are one."""
    alike: dict[tuple[str, Layer], list[Layer]] = {}
    for layer in found:
        alike.setdefault((_pattern(layer.site), layer._replace(site="")), []).append(layer)
    patterns = {pattern for pattern, _ in alike}
    short = {pattern: pattern.partition("*.")[2] or pattern for pattern in patterns}
    clear = [name for name in short.values() if list(short.values()).count(name) == 1]
    return [
        Kind(short[p] if short[p] in clear else p, len(same), same[0], sum(n.trained for n in same))
        for (p, _), same in alike.items()
    ]


def _pattern(site: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in site.split("."))
