"""Dense weights again of factored layers, for programs that know no others."""

from __future__ import annotations

import torch
from torch import nn

from veneer.compress.swap import swap
from veneer.errors import ConfigError, first_few
from veneer.sites import Site
from veneer.sites.factored.layers import Factored, plain_linear


def expand(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Returns the same model with W = B A, multiplied out, in place of every factored layer; adapters stay
    attached.

    dtype: of the weights; each layer's own unless given. Raises ConfigError, before anything is changed, for
    layers with
    a bias that the model's own class lacks.

        veneer.expand(model).save_pretrained("dense")

    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, Factored)}
    added = [n for n, m in found.items() if m.added_bias]
    if added:
        raise ConfigError(
            f"model: {len(added)} factored layers have a bias that their class lacks ({first_few(added, 3)});"
            f" compress with centre=False for dense weights"
        )
    return swap(model, found, lambda site: _dense(site, dtype))


def _dense(site: Site, dtype: torch.dtype | None) -> nn.Module:
    layer = site.module
    W = site.weight().detach().to(dtype or site.dtype)
    bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(W.dtype), requires_grad=False)
    if not layer.transposed:
        return plain_linear(W, bias)
    from transformers.pytorch_utils import Conv1D

    made: nn.Module = Conv1D(1, 1)
    made.nf, made.nx = W.shape  # type: ignore[assignment]
    made.weight = nn.Parameter(W.mT.contiguous(), requires_grad=False)
    made.bias = bias if bias is not None else nn.Parameter(W.new_zeros(len(W)), requires_grad=False)
    return made
