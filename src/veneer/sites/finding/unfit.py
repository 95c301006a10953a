"""Names layers that cannot be adapted, with the reason and the way out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from veneer.errors import SiteError, first_few, option
from veneer.sites.bare.layouts import is_transposed, stacks
from veneer.sites.finding.kinds import kind_of
from veneer.sites.finding.names import Target, meant
from veneer.sites.quantised import packed_kind

# Layers whose owner reads `.weight` itself, so that a hook never runs: (owner's class, layer, why).
DIRECT_READERS = [
    ("MultiheadAttention", "out_proj", "torch's attention passes its weight to one fused function"),
    ("MambaMixer", "dt_proj", "the mixer multiplies by its weight itself"),
    ("FalconMambaMixer", "dt_proj", "the mixer multiplies by its weight itself"),
    ("JambaMambaMixer", "dt_proj", "the mixer multiplies by its weight itself"),
]


class Unfit(NamedTuple):
    """A layer, the reason in a few words, and the whole error."""

    name: str
    why: str
    text: str


def unfit(layers: dict[str, nn.Module], names: Iterable[str], untie: bool) -> list[Unfit]:
    """Returns the layers among `names` that cannot be adapted."""
    names = list(names)
    found = [*_unknown(layers, names), *_packed(layers, names), *_read_directly(layers, names)]
    return found if untie else [*found, *_tied(layers, names)]


def refuse_unknown_stacks(layers: dict[str, nn.Module], to: Target) -> None:
    """Raises SiteError naming the stacks of matrices in `to` of which the input's dimension is unknown."""
    found = {
        f"{n}.{p}": t
        for n, m in layers.items()
        if kind_of(m) is None
        for p, t in stacks(m).items()
        if is_transposed(m, p) is None
    }
    named = [n for n in found if meant(n, to)]
    if named:
        shapes = [f"{n!r} {tuple(found[n].shape)}" for n in named]
        raise SiteError(
            f"to: must name matrices of a known layout, got {first_few(shapes)}: the input's dimension is"
            " unknown; leave these out"
        )


def _unknown(layers: dict[str, nn.Module], names: Iterable[str]) -> Iterator[Unfit]:
    for n in names:
        if kind_of(layers[n]) is None:
            inner = [f"{n}.{k}" for k, m in layers[n].named_modules() if k and kind_of(m)]
            hint = f"; name layers inside it, e.g. {first_few(inner, 3)}" if inner else ""
            text = f"{n!r} is a {type(layers[n]).__name__}, which holds no linear map known here{hint}"
            yield Unfit(n, "of an unknown kind", text)


def _packed(layers: dict[str, nn.Module], names: Iterable[str]) -> Iterator[Unfit]:
    """Yields subclasses of known layers whose weight is stored in an unknown format."""
    for n in names:
        weight = layers[n]._parameters.get("weight")
        if packed_kind(layers[n]) or weight is None or kind_of(layers[n]) is None:
            continue
        if not (weight.is_floating_point() and weight.element_size() > 1):
            text = (
                f"{n!r} is a {type(layers[n]).__name__} whose weight is packed ({weight.dtype}), which"
                " cannot be read or merged here; load the model in bfloat16 or float32"
            )
            yield Unfit(n, "packed", text)


def _read_directly(layers: dict[str, nn.Module], names: Iterable[str]) -> Iterator[Unfit]:
    for n in names:
        owner, _, last = n.rpartition(".")
        kinds = {c.__name__ for c in type(layers.get(owner)).__mro__} if owner else set()
        for reader, layer, why in DIRECT_READERS:
            if reader in kinds and layer == last:
                text = f"{n!r} cannot be adapted by a hook: {why}; leave it out with exclude={[last]!r}"
                yield Unfit(n, "read by their owner", text)


def tied(layers: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Returns, by layer, the names of the other layers that share its weight."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for n, m in layers.items():
        weight = m._parameters.get("weight")
        if weight is not None:
            owners[id(weight)].append(n)
    return {n: [o for o in names if o != n] for names in owners.values() if len(names) > 1 for n in names}


def _tied(layers: dict[str, nn.Module], names: Iterable[str]) -> Iterator[Unfit]:
    ties = tied(layers)
    for n in names:
        if n in ties:
            text = (
                f"{n!r} shares its weight with {first_few(ties[n])}, and merging a change of one would"
                f" change both; leave it out, or pass {option('untie', True)} to adapt this one alone"
            )
            yield Unfit(n, "tied", text)
