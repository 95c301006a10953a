"""Quantises linear layers of a base to 8 or 4 bits (QLoRA), and back.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. Quantised are the layers of "all-linear", nn.Linear
and transformers' Conv1D, one at a time, so that at most one layer is in memory twice. Embeddings, norms,
output heads and expert weights are unchanged. Weights are rounded to bfloat16 before packing, so that a model
loaded in float32 or in bfloat16 gives the same bytes on every machine. Formats, cost and error: see
veneer.ops.quant.

QPiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948) and LoftQ (Li et al. 2023,
https://arxiv.org/abs/2310.08659) quantise a layer together with a low-rank adapter that compensates a part of
the error: Q + s B A ~ W. Both alternate five times between Q and B A and keep the best; LoftQ begins with Q
of W, QPiSSA with the leading part of W, so that A and B hold its main directions. Both decompose W - s B A,
scaling included (PEFT's LoftQ ignores s). The adapter fits this Q only, so `veneer.save_quantised` stores Q
beside it. Use: at 4 bits, where plain LoRA must repair the error first. Against: at ranks 8 to 16 only a few
per cent of nf4's error are compensated; the authors report larger gains at ranks 64 and 128; users did not
reproduce LoftQ's figures.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from veneer.adapt.attached import adapters
from veneer.adapt.hooks import refuse_compiled
from veneer.adapt.per_layer import check_patterns, options_at
from veneer.compress.places import Places
from veneer.compress.swap import one_by_one, swap
from veneer.errors import ConfigError, SiteError, first_few, suggest
from veneer.methods import Stats
from veneer.methods.lora import LoRA
from veneer.ops import quant
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import check_rank
from veneer.ops.matrix.residual import split
from veneer.sites import Site, find, site_for
from veneer.sites.factored.layers import Factored
from veneer.sites.factored.site import factored_forms
from veneer.sites.finding.names import Target
from veneer.sites.quantised import packed_kind
from veneer.sites.quantised_linear import QuantisedLinear

STARTS = {"qpissa": True, "loftq": False}  # True: the first low-rank part is that of W itself


def quantise(model: nn.Module, format: str = "nf4", *, exclude: Target = ()) -> nn.Module:
    """Quantises the linear layers of the model in place to `format`, int8, nf4 or spqr, and returns it.

    Attach adapters afterwards. exclude: layers to leave unchanged, as in attach. Raises ConfigError, and
    SiteError for layers that cannot be packed, before any change.
    """
    chosen = quant.get(format)
    sites, places = plain_sites(model, exclude), Places(model)
    _warn_of_pivots(model, format)
    for site in one_by_one(sites):
        places.put(site.module, layer_of(site, chosen.pack(_as_loaded(site)), chosen))
    return model


def quantise_around(
    model: nn.Module,
    format: str = "nf4",
    *,
    start: str = "qpissa",
    rank: int = 8,
    to: Target | None = None,
    exclude: Target = (),
    rank_pattern: Mapping[str, int] | None = None,
    iterations: int = 5,
    seed: int = 0,
) -> dict[str, Stats]:
    """Quantises the model and returns the stats for attach(model, "lora", init=start, rank=.., stats=..).

    start: qpissa or loftq. to, exclude, rank, rank_pattern: layers and ranks of the future adapter, as in
    attach; other linear layers are quantised without compensation. Raises ConfigError, SiteError and
    ShapeError before any change.
    """
    chosen = quant.get(format)
    if start not in STARTS:
        raise ConfigError(f"unknown start {start!r} of a quantised base{suggest(start, STARTS)}")
    if iterations < 1:
        raise ConfigError(f"iterations must be >= 1, got {iterations}")
    sites = plain_sites(model)
    ranks = _ranks(find(model, "all-linear" if to is None else to, exclude), rank, rank_pattern or {})
    if others := sorted(ranks.keys() - {s.name for s in sites}):
        raise ConfigError(f"start {start!r}: layers must be quantised, got {first_few(others)}; exclude them")
    places, found = Places(model), {}
    for site in one_by_one(sites):
        W = _as_loaded(site)
        if site.name in ranks:
            draw, first = keyed(seed, f"{site.name} {start}"), STARTS[start]
            r = ranks[site.name]
            parts, low, left = split(W, chosen, r, iterations=iterations, draw=draw, whole_first=first)
            found[site.name] = Stats(residual=low, left=left)
        else:
            parts = chosen.pack(W)
        places.put(site.module, layer_of(site, parts, chosen))
    return found


def dequantise(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces packed layers in place by plain linear layers with the unpacked weights.

    dtype: of the weights; that of each layer unless given. bitsandbytes' and torchao's layers are unpacked
    too. Adapters stay attached, active and trainable as before.
    """
    packed = [n for n, m in model.named_modules() if packed_kind(m)]
    return swap(model, packed, lambda site: _plain(site, dtype))


@contextmanager
def as_plain(model: nn.Module) -> Iterator[None]:
    """Replaces packed layers inside the block by plain ones on the meta device, which have shapes only."""
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    places = Places(model)
    for module in packed.values():
        places.put(
            module,
            nn.Linear(
                module.in_features,
                module.out_features,
                module.bias is not None,
                device="meta",
                dtype=module.dtype,
            ),
        )
    try:
        yield
    finally:
        for module in packed.values():
            places.put(module, module)


def _warn_of_pivots(model: nn.Module, format: str) -> None:
    """Warns of factors that lose far more in 4 bits than a dense layer does."""
    pivoted = [n for n, form in factored_forms(model).items() if form == "pivoted"]
    if pivoted and format != "int8":
        warnings.warn(
            f"quantise: {len(pivoted)} pivoted layers lose far more in {format} than plain factors;"
            " compress with storage='plain', or use int8",
            stacklevel=3,
        )


def _ranks(sites: list[Site], rank: int, pattern: Mapping[str, int]) -> dict[str, int]:
    """Returns {layer: rank of its adapter}. Raises ConfigError and ShapeError."""
    check_patterns(sites, pattern)
    ranks = {s.name: int(options_at(s.name, LoRA, {"rank": rank}, pattern, None)["rank"]) for s in sites}
    for site in sites:
        check_rank(ranks[site.name], site.weight(), site.name)
    return ranks


def plain_sites(model: nn.Module, exclude: Target = ()) -> list[Site]:
    """Returns the layers to quantise. Raises ConfigError and SiteError if the model cannot be quantised."""
    refuse_compiled(model)
    if adapters(model):
        raise ConfigError(
            f"quantise the base before adapters are attached; attached: {first_few(adapters(model))}"
        )
    sites = [part for s in find(model, "all-linear", exclude) for part in _parts(s)]
    packed = [s.name for s in sites if s.is_packed]
    if packed:
        raise ConfigError(f"{len(packed)} layers are quantised already: {first_few(packed)}")
    held = [
        s.name
        for s in sites
        if s.module._forward_hooks or s.module._forward_pre_hooks or "forward" in s.module.__dict__
    ]
    if held:
        raise SiteError(
            f"hooks or a custom forward would be lost at {first_few(held)}; quantise before adding them"
        )
    wild = [
        s.name for s in sites if not s.module.weight.is_meta and not bool(torch.isfinite(s.weight()).all())
    ]
    if wild:
        raise SiteError(
            f"weights must be finite, got NaN or infinity at {first_few(wild)}; check the checkpoint"
        )
    return sites


def _parts(site: Site) -> list[Site]:
    """Returns the layers that hold the site's matrix: two inside a factored layer, else the layer."""
    module = site.module
    names = module.inner if isinstance(module, Factored) else ()
    held = [site_for(f"{site.name}.{n}", getattr(module, n)) for n in names]
    return [s for s in held if s.out] or [site]  # a pivoted layer of full rank has no second factor


def _as_loaded(site: Site) -> Tensor:
    """Returns W rounded to bfloat16, so that all copies of a model give the same codes."""
    return site.weight().detach().bfloat16().to(site.dtype)


def layer_of(site: Site, parts: quant.Parts, format: quant.Format) -> QuantisedLinear:
    """Returns a quantised layer with the bias and the mode of the site's own."""
    bias = site.module.bias
    if bias is not None:
        bias.requires_grad_(False)
    return QuantisedLinear(parts, (site.out, site.in_), bias, format).train(site.module.training)


def _plain(site: Site, dtype: torch.dtype | None) -> nn.Linear:
    """Returns the unpacked layer."""
    old, new = site.module, nn.Linear(site.in_, site.out, bias=False, device="meta")
    W = site.weight().to(dtype or (site.dtype if old.bias is None else old.bias.dtype))
    new.weight = nn.Parameter(W, requires_grad=False)
    if old.bias is not None:
        new.register_parameter("bias", nn.Parameter(old.bias.to(W.dtype), requires_grad=False))
    return new.train(old.training)
