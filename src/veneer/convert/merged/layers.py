"""Merges one layer of a PEFT model in a copy of its own, and returns the change of its parameters."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer import methods
from veneer.adapt.attached import Changes
from veneer.convert.merged.holding import holding, with_bias
from veneer.errors import FormatError
from veneer.sites import BiasSite, LeafSite, site_for
from veneer.sites.finding.kinds import kind_of

AGREE = {torch.float64: 1e-6, torch.float32: 1e-4}  # merged and unmerged outputs, relative
TOKENS = 4096  # of an embedding that are looked up to compare


class Merged(NamedTuple):
    """before, after: the base layer without and with its change; both are copies in `dtype`."""

    before: nn.Module
    after: nn.Module
    dtype: torch.dtype


@torch.no_grad()
def of_layer(name: str, layer: Any, task: int | None = None) -> Changes:
    """Returns the change of the layer that PEFT's `layer` wraps, as deltas of the base's own layer.

    task: number of the task whose mixture POLY's layer computes. Raises FormatError if PEFT's merged layer
    computes something else than its unmerged one.
    """
    base = layer.get_base_layer()
    if task is not None:
        return _of_task(name, layer, base, task)
    done = _merged(name, layer)
    if kind_of(base) is None:
        return _of_parameters(name, base, done)
    site = site_for(name, base)
    D = site_for(name, done.after).weight() - site_for(name, done.before).weight()
    b = _bias(done.after) - _bias(done.before)
    own = base._parameters.get("bias")
    if not b.any():
        return [(site, holding(site, D))]
    if not D.any():
        shift = BiasSite(name, base)
        delta = methods.build(methods.get("bitfit"), shift, {})
        delta.get_parameter("d").copy_(b)
        return [(shift, delta)]
    if own is None:
        raise FormatError(
            f"{name}: the adapter changes the weight and adds a bias to a layer without one;"
            f" merge it in PEFT and keep the merged model"
        )
    return [(site, with_bias(site, holding(site, D), b))]


def _merged(name: str, layer: Any) -> Merged:
    """Merges in float64, or in float32 where PEFT's layer cannot compute in float64."""
    try:
        return _merged_in(name, layer, torch.float64)
    except (RuntimeError, TypeError, NotImplementedError):
        return _merged_in(name, layer, torch.float32)


def _merged_in(name: str, layer: Any, dtype: torch.dtype) -> Merged:
    twin = copy.deepcopy(layer).to(dtype).eval()
    inner = twin.get_base_layer()
    if hasattr(twin, "beft_bias") and inner.bias is None:  # which PEFT merges only into a bias that is there
        inner.bias = nn.Parameter(next(inner.parameters()).new_zeros(len(inner.weight)))
    before = copy.deepcopy(inner)
    x = _inputs(inner)
    y = twin(x)
    twin.merge(safe_merge=True)
    after = twin.get_base_layer()
    error = float((after(x) - y).norm()) / max(float(y.norm()), torch.finfo(dtype).tiny)
    if not error <= AGREE[dtype]:
        raise FormatError(
            f"{name}: PEFT's own merge changes the outputs by {error:.1e} of their size, so it is not"
            f" the adapter's change of this layer; serve it with PEFT"
        )
    return Merged(before, after, dtype)


def _inputs(base: nn.Module) -> Tensor:
    """Returns random inputs of the layer: tokens of an embedding, an image of a convolution, or vectors."""
    draw, weight = torch.Generator().manual_seed(0), next(base.parameters())
    if isinstance(base, nn.Embedding):
        return torch.randint(0, base.num_embeddings, (TOKENS,), generator=draw).to(weight.device)
    if isinstance(base, nn.modules.conv._ConvNd):
        reach = [d * (k - 1) + 3 for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        return torch.randn(1, base.in_channels, *reach, generator=draw).to(weight)
    width = site_for("", base).in_ if kind_of(base) else weight.shape[-1]
    return torch.randn(4, width, generator=draw).to(weight)


def _bias(module: nn.Module) -> Tensor:
    bias = module._parameters.get("bias")
    return torch.zeros(1) if bias is None else bias.detach()


def _of_parameters(name: str, base: nn.Module, done: Merged) -> Changes:
    """Returns the change of all parameters of a layer that is not a matrix, such as a norm."""
    site = LeafSite(name, base)
    before, after = (LeafSite(name, m).weight() for m in (done.before, done.after))
    delta = methods.build(methods.get("full"), site, {})
    delta.get_parameter("D").copy_(after - before)
    return [(site, delta)]


def _of_task(name: str, layer: Any, base: nn.Module, task: int) -> Changes:
    """Returns the change for one task of a layer without a merge, from its outputs for unit vectors."""
    twin, site = copy.deepcopy(layer).double().eval(), site_for(name, base)
    one = torch.eye(site.in_, dtype=torch.float64, device=site.device)[None]
    y: Tensor = twin(one, task_ids=torch.tensor([task], device=site.device))
    D = (y - twin.get_base_layer()(one))[0].mT
    return [(site, holding(site, D))]
