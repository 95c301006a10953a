"""A base whose linear layers are kept in 8 or 4 bits (QLoRA), and back.  Dettmers et al. 2023, https://arxiv.org/abs/2305.14314

The layers are those that "all-linear" means, nn.Linear and transformers' Conv1D, one after the other, so that no more than one
of them exists twice. Embeddings, norms, output heads and weights that no layer of these kinds holds (experts) stay as they are.
The same weights give the same bytes on any machine, loaded in float32 or bfloat16 (of which the latter's rounding is what is
packed). Formats, cost and error: see veneer.ops.quant.

QPiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948) and LoftQ (Li et al. 2023, https://arxiv.org/abs/2310.08659) quantise
a layer so that an adapter of low rank makes up for a part of the error: Q + s B A ~ W. This changes the base: an adapter that
starts so belongs to this Q and no other, which `veneer.save_quantised` keeps beside it. Both alternate between Q and B A five
times; LoftQ begins with Q of W, QPiSSA with the leading part of W, so that A and B hold what matters most. The best of the
alternations is kept. s is respected: what is taken apart is W - s B A (PEFT's LoftQ leaves s out).
Use: at 4 bits, where the plain start of LoRA has to repair the error first. Against: at ranks of 8 to 16 a few per cent of nf4's
error go away; the authors' larger gains are at rank 64 and 128; users did not reach LoftQ's published figures.
"""

from __future__ import annotations

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
from veneer.sites.find import Target
from veneer.sites.quantised import packed_kind
from veneer.sites.quantised_linear import QuantisedLinear

STARTS = {"qpissa": True, "loftq": False}  # whether the first low-rank part is that of W itself


def quantise(model: nn.Module, format: str = "nf4", *, exclude: Target = ()) -> nn.Module:
    """The same model with its linear layers in `format`, int8 or nf4; adapters are attached afterwards.

    exclude: layers that stay as they are, as in attach. Raises ConfigError, and SiteError for layers that cannot be packed,
    before anything is changed.
    """
    chosen = quant.get(format)
    sites, places = plain_sites(model, exclude), Places(model)
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
    """Quantises the model and returns what attach(model, "lora", init=start, rank=.., stats=..) starts from.

    start: qpissa or loftq. to, exclude, rank, rank_pattern: the layers and ranks of the adapter to come, as in attach; all
    other linear layers are quantised plainly. Raises ConfigError, SiteError and ShapeError before anything is changed.
    """
    chosen = quant.get(format)
    if start not in STARTS:
        raise ConfigError(f"unknown start {start!r} of a quantised base{suggest(start, STARTS)}")
    if iterations < 1:
        raise ConfigError(f"iterations {iterations} must be 1 or more")
    sites = plain_sites(model)
    ranks = _ranks(find(model, "all-linear" if to is None else to, exclude), rank, rank_pattern or {})
    others = sorted(ranks.keys() - {s.name for s in sites})
    if others:
        raise ConfigError(
            f"start {start!r} makes up for what quantisation takes, and these are not quantised: {first_few(others)}"
        )
    places, found = Places(model), {}
    for site in one_by_one(sites):
        W = _as_loaded(site)
        if site.name in ranks:
            draw = keyed(seed, f"{site.name} {start}")
            parts, low, left = split(
                W, chosen, ranks[site.name], iterations=iterations, draw=draw, whole_first=STARTS[start]
            )
            found[site.name] = Stats(residual=low, left=left)
        else:
            parts = chosen.pack(W)
        places.put(site.module, layer_of(site, parts, chosen))
    return found


def dequantise(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The same model with plain linear layers that hold what the packed ones held, in dtype, each layer's own unless given.

    bitsandbytes' and torchao's layers are unpacked too. Adapters stay attached, acting and training as they were.
    """
    packed = [n for n, m in model.named_modules() if packed_kind(m)]
    return swap(model, packed, lambda site: _plain(site, dtype))


@contextmanager
def as_plain(model: nn.Module) -> Iterator[None]:
    """Within the block packed layers are plain ones without content (on the meta device), for what looks at shapes alone."""
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


def _ranks(sites: list[Site], rank: int, pattern: Mapping[str, int]) -> dict[str, int]:
    """The rank of every layer's adapter by its name. Raises ConfigError and ShapeError."""
    check_patterns(sites, pattern)
    ranks = {s.name: int(options_at(s.name, LoRA, {"rank": rank}, pattern, None)["rank"]) for s in sites}
    for site in sites:
        check_rank(ranks[site.name], site.weight(), site.name)
    return ranks


def plain_sites(model: nn.Module, exclude: Target = ()) -> list[Site]:
    """The layers to quantise. Raises ConfigError and SiteError where that cannot be done."""
    refuse_compiled(model)
    if adapters(model):
        raise ConfigError(
            f"quantise the base first and attach afterwards; attached now: {first_few(adapters(model))}"
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
            f"these layers have hooks or a forward of their own, which would be lost: {first_few(held)}; quantise before them"
        )
    wild = [
        s.name for s in sites if not s.module.weight.is_meta and not bool(torch.isfinite(s.weight()).all())
    ]
    if wild:
        raise SiteError(
            f"NaN or infinity in the weights of {first_few(wild)}, which no format can hold; is the checkpoint whole?"
        )
    return sites


def _parts(site: Site) -> list[Site]:
    """The layers that hold the site's matrix: the two inside a factored layer, or the layer itself."""
    module = site.module
    names = module.inner if isinstance(module, Factored) else ()
    held = [site_for(f"{site.name}.{n}", getattr(module, n)) for n in names]
    return [s for s in held if s.out] or [site]  # a pivoted layer of full rank has no second factor


def _as_loaded(site: Site) -> Tensor:
    """W rounded to bfloat16, so that all copies of a model are packed alike."""
    return site.weight().detach().bfloat16().to(site.dtype)


def layer_of(site: Site, parts: quant.Parts, format: quant.Format) -> QuantisedLinear:
    bias = site.module.bias
    if bias is not None:
        bias.requires_grad_(False)
    return QuantisedLinear(parts, (site.out, site.in_), bias, format).train(site.module.training)


def _plain(site: Site, dtype: torch.dtype | None) -> nn.Linear:
    """The layer unpacked."""
    old, new = site.module, nn.Linear(site.in_, site.out, bias=False, device="meta")
    W = site.weight().to(dtype or (site.dtype if old.bias is None else old.bias.dtype))
    new.weight = nn.Parameter(W, requires_grad=False)
    if old.bias is not None:
        new.register_parameter("bias", nn.Parameter(old.bias.to(W.dtype), requires_grad=False))
    return new.train(old.training)
