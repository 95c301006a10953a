"""From patterns to sites: which layers of a model are adapted, and which must not be."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn

from veneer.errors import SiteError, first_few, option, suggest
from veneer.sites.base import Site
from veneer.sites.conv import ConvSite
from veneer.sites.embedding import EmbeddingSite
from veneer.sites.factored.layers import Factored
from veneer.sites.factored.site import FactoredSite
from veneer.sites.linear import LinearSite, TransposedSite
from veneer.sites.own import base_modules
from veneer.sites.quantised import packed_kind
from veneer.sites.roles import output_head as output_head
from veneer.sites.roles import resolved, without_idle

Target = str | Sequence[str]

KINDS: list[tuple[type[nn.Module], type[Site]]] = [
    (nn.Linear, LinearSite),
    (Factored, FactoredSite),
    (nn.Embedding, EmbeddingSite),
    (nn.Conv1d, ConvSite),
    (nn.Conv2d, ConvSite),
    (nn.Conv3d, ConvSite),
]

# Layers whose owner reads `.weight` itself, so that a hook on them would never run: (owner's class, layer,
# why).
DIRECT_READERS = [
    ("MultiheadAttention", "out_proj", "torch's attention passes its weight to one fused function"),
    ("MambaMixer", "dt_proj", "the mixer multiplies by its weight itself"),
    ("FalconMambaMixer", "dt_proj", "the mixer multiplies by its weight itself"),
    ("JambaMambaMixer", "dt_proj", "the mixer multiplies by its weight itself"),
]


def kind_of(module: nn.Module) -> type[Site] | None:
    """The Site class for a layer, or None if it holds no linear map known here."""
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return TransposedSite
    return packed_kind(module) or next((site for layer, site in KINDS if isinstance(module, layer)), None)


def site_for(name: str, module: nn.Module) -> Site:
    """The site of one layer. Raises SiteError for a layer of an unknown kind."""
    kind = kind_of(module)
    if kind is None:
        known = ", ".join([layer.__name__ for layer, _ in KINDS] + ["transformers' Conv1D"])
        raise SiteError(
            f"{name!r} is a {type(module).__name__}, which holds no linear map known here; known: {known}"
        )
    return kind(name, module)


def find(
    model: nn.Module, to: Target = "all-linear", exclude: Target = (), untie: bool = False
) -> list[Site]:
    """The sites that `to` names, in the model's order.

    to: "all-linear" (every Linear and Conv1D but the output head), a role such as "attention" (see roles), a
    regular expression for whole names, or a list of roles, names and endings of names ("q_proj"). exclude:
    the same, but "all-linear". Raises SiteError, before anything is changed, for an entry that matches
    nothing, a layer of an unknown kind, one whose owner reads its weight directly, and (unless `untie`) one
    that shares its weight with another.
    """
    layers = _whole(base_modules(model))
    head = output_head(model)
    kinds = {n: k.kind for n, m in layers.items() if n not in head and (k := kind_of(m))}
    wanted = _match(model, layers, resolved(model, to, kinds))
    exclude = without_idle(exclude, resolved(model, exclude, kinds), wanted)
    _check_exclude(wanted, exclude)
    names = [n for n in wanted if not _meant(n, exclude)]
    if not names:
        raise SiteError(f"no layer is left to adapt: to={to!r}, exclude={exclude!r}")
    problems = [*_unknown(layers, names), *_packed(layers, names), *_read_directly(layers, names)]
    if not untie:
        problems += _tied(layers, names)
    if problems:
        raise SiteError("\n".join(problems))
    return [site_for(n, layers[n]) for n in names]


def _whole(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the layers without those inside a factored layer, which is adapted as one."""
    inside = {f"{n}.{k}" for n, m in layers.items() if isinstance(m, Factored) for k in m.inner}
    return {n: m for n, m in layers.items() if n not in inside}


def named(
    model: nn.Module, to: Target | None, exclude: Target, fits: Callable[[nn.Module], bool]
) -> list[str]:
    """Names of the modules of any class that fit and that `to` names (all of them if None), in the model's
    order.

    to, exclude: as in find, less "all-linear". Raises SiteError for an entry that names none of them.
    """
    modules = [n for n, m in base_modules(model).items() if fits(m)]
    entries = [] if to is None else [to] if isinstance(to, str) else list(to)
    idle = [e for e in entries if not any(_chosen(n, to if isinstance(to, str) else [e]) for n in modules)]
    if idle:
        raise SiteError(
            "\n".join(
                f"no module that could be changed is called {e!r}; there are e.g. {first_few(modules, 3)}"
                for e in idle
            )
        )
    names = [n for n in modules if to is None or _chosen(n, to)]
    _check_exclude(names, exclude)
    return [n for n in names if not _meant(n, exclude)]


def _chosen(name: str, target: Target) -> bool:
    try:
        return _meant(name, target)
    except re.error as e:
        raise SiteError(f"to={target!r} is not a regular expression: {e}") from None


def _match(model: nn.Module, layers: dict[str, nn.Module], to: Target) -> list[str]:
    if to == "all-linear":
        head = output_head(model)
        return [
            n
            for n, m in layers.items()
            if (kind := kind_of(m)) and kind.kind in ("linear", "transposed") and n not in head
        ]
    if isinstance(to, str):
        return _by_expression(layers, to)
    found = {entry: [n for n in layers if _ends(n, entry)] for entry in to}
    missing = [entry for entry, names in found.items() if not names]
    if missing:
        endings = {n.rsplit(".", 1)[-1] for n, m in layers.items() if kind_of(m)}
        raise SiteError(
            "\n".join(f"no layer is called {entry!r}{suggest(entry, endings)}" for entry in missing)
        )
    chosen = {n for names in found.values() for n in names}
    return [n for n in layers if n in chosen]


def _by_expression(layers: dict[str, nn.Module], expression: str) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as e:
        raise SiteError(f"to={expression!r} is not a regular expression: {e}") from None
    names = [n for n, m in layers.items() if pattern.fullmatch(n) and kind_of(m)]
    if not names:
        some = first_few([n for n, m in layers.items() if kind_of(m)], 3)
        raise SiteError(f"no layer matches to={expression!r}; the model has e.g. {some}")
    return names


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _check_exclude(names: Sequence[str], exclude: Target) -> None:
    """Raises SiteError for a malformed expression, and for entries that exclude no target."""
    if isinstance(exclude, str):
        try:
            re.compile(exclude)
        except re.error as e:
            raise SiteError(f"exclude={exclude!r} is not a regular expression: {e}") from None
    entries = [exclude] if isinstance(exclude, str) else list(exclude)
    idle = [
        entry
        for entry in entries
        if not any(_meant(n, exclude if isinstance(exclude, str) else [entry]) for n in names)
    ]
    if idle:
        endings = {n.rsplit(".", 1)[-1] for n in names}
        raise SiteError(
            "\n".join(f"exclude={entry!r} leaves out no layer{suggest(entry, endings)}" for entry in idle)
        )


def _meant(name: str, target: Target) -> bool:
    """Returns True if an expression matches the name, or an entry of a list ends it."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(_ends(name, entry) for entry in target)


def _unknown(layers: dict[str, nn.Module], names: Iterable[str]) -> Iterator[str]:
    for n in names:
        if kind_of(layers[n]) is None:
            inner = [f"{n}.{k}" for k, m in layers[n].named_modules() if k and kind_of(m)]
            hint = f"; name layers inside it, e.g. {first_few(inner, 3)}" if inner else ""
            yield f"{n!r} is a {type(layers[n]).__name__}, which holds no linear map known here{hint}"


def _packed(layers: dict[str, nn.Module], names: Iterable[str]) -> Iterator[str]:
    """Subclasses of known layers whose weight is codes for W in a way that is not known here."""
    for n in names:
        if packed_kind(layers[n]):
            continue
        weight = layers[n]._parameters.get("weight")
        if (
            kind_of(layers[n])
            and weight is not None
            and not (weight.is_floating_point() and weight.element_size() > 1)
        ):
            yield (
                f"{n!r} is a {type(layers[n]).__name__} whose weight is packed ({weight.dtype}), which"
                f" cannot be read or merged here;"
                f" load the model in bfloat16 or float32"
            )


def _read_directly(layers: dict[str, nn.Module], names: Iterable[str]) -> Iterator[str]:
    for n in names:
        owner, _, last = n.rpartition(".")
        kinds = {c.__name__ for c in type(layers.get(owner)).__mro__} if owner else set()
        for reader, layer, why in DIRECT_READERS:
            if reader in kinds and layer == last:
                yield f"{n!r} cannot be adapted by a hook: {why}; leave it out with exclude={[last]!r}"


def tied(layers: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Layer name -> the names of the other layers that share its weight."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for n, m in layers.items():
        weight = m._parameters.get("weight")
        if weight is not None:
            owners[id(weight)].append(n)
    return {n: [o for o in names if o != n] for names in owners.values() if len(names) > 1 for n in names}


def _tied(layers: dict[str, nn.Module], names: Iterable[str]) -> Iterator[str]:
    ties = tied(layers)
    for n in names:
        if n in ties:
            yield (
                f"{n!r} shares its weight with {first_few(ties[n])}, and merging a change of one would"
                f" change both; "
                f"leave it out, or pass {option('untie', True)} to adapt this one alone"
            )
