"""Knows the kinds of layers that hold a linear map, and the site of each."""

from __future__ import annotations

from torch import nn

from veneer.errors import SiteError
from veneer.sites.bare.site import Holder, ParameterSite, holders
from veneer.sites.base import Site
from veneer.sites.conv import ConvSite
from veneer.sites.embedding import EmbeddingSite
from veneer.sites.factored.layers import Factored
from veneer.sites.factored.site import FactoredSite
from veneer.sites.linear import LinearSite, TransposedSite
from veneer.sites.own import base_modules
from veneer.sites.quantised import packed_kind

KINDS: list[tuple[type[nn.Module], type[Site]]] = [
    (nn.Linear, LinearSite),
    (Factored, FactoredSite),
    (nn.Embedding, EmbeddingSite),
    (nn.Conv1d, ConvSite),
    (nn.Conv2d, ConvSite),
    (nn.Conv3d, ConvSite),
    (Holder, ParameterSite),
]


def kind_of(module: nn.Module) -> type[Site] | None:
    """Returns the Site class for a layer, or None if it holds no linear map known here."""
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return TransposedSite
    return packed_kind(module) or next((site for layer, site in KINDS if isinstance(module, layer)), None)


def site_for(name: str, module: nn.Module) -> Site:
    """Returns the site of one layer. Raises SiteError for a layer of an unknown kind."""
    kind = kind_of(module)
    if kind is None:
        known = ", ".join(
            [layer.__name__ for layer, _ in KINDS if layer is not Holder] + ["transformers' Conv1D"]
        )
        raise SiteError(
            f"{name!r} is a {type(module).__name__}, which holds no linear map known here; known: {known}"
        )
    return kind(name, module)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the model's modules by name, and the holders of its bare parameters' matrices.

    Those inside a factored layer, which is adapted as one, are left out.
    """
    modules = base_modules(model)
    inside = {f"{n}.{k}" for n, m in modules.items() if isinstance(m, Factored) for k in m.inner}
    return dict(holders({n: m for n, m in modules.items() if n not in inside}))


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    """Returns the module of this name, or the holder of a bare parameter's matrix, or None without one."""
    found = dict(model.named_modules()).get(name)
    return layers_of(model).get(name) if found is None else found
