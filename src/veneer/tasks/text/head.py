"""Cuts a language model in two: a body that makes features, and a head that turns them into logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating


class Head(NamedTuple):
    """logits = cap(layer(features) * scale), adapters of the layer included.

    The scale is Cohere's `logit_scale` or the inverse of Granite's `logits_scaling`; cap(z) = c tanh(z / c)
    is Gemma 2's.
    """

    body: nn.Module
    layer: nn.Module
    scale: float = 1.0
    cap: float | None = None

    def features(self, inputs: Mapping[str, Any]) -> Tensor:
        """Returns the head's input (b, t, width)."""
        found: Tensor = self.body(**inputs)[0]
        return found

    def logits(self, features: Tensor) -> Tensor:
        """Returns logits (.., vocabulary) for features (.., width)."""
        logits: Tensor = self.layer(features)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def parameters(self) -> list[Tensor]:
        """Returns the head's trained parameters, those of a tied embedding and of adapters included."""
        return [p for p in self.layer.parameters() if p.requires_grad]


def cut(model: nn.Module) -> Head | None:
    """Returns the halves of a transformers model; None for another model or one that is wrapped as a whole.

    Models may do more to their logits: check that the halves give the same ones.
    """
    body, find = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", None)
    if (
        not isinstance(body, nn.Module)
        or body is model
        or find is None
        or model._forward_pre_hooks
        or "forward" in model.__dict__
    ):
        return None
    layer, config = find(), _settings(model)
    if not isinstance(layer, nn.Module):
        return None
    scale = config("logit_scale") or 1 / (config("logits_scaling") or 1.0)
    return Head(body, layer, float(scale), config("final_logit_softcapping"))


def _settings(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    text = (
        config.get_text_config()
        if config is not None and callable(getattr(config, "get_text_config", None))
        else config
    )
    return lambda name: getattr(text, name, None)


@torch.no_grad()
def difference(model: nn.Module, head: Head, inputs: Mapping[str, Any], places: Tensor) -> float:
    """Returns the largest difference of the model's logits and the halves' at `places` (b, t), relative.

    Relative to the largest logit, without dropout; nan if the shapes differ.
    """
    with evaluating(model):
        own = model(**inputs).logits[places].double()
        cut = head.logits(head.features(inputs)[places]).double()
    if own.shape != cut.shape:
        return float("nan")
    return (
        float((own - cut).abs().max() / own.abs().max().clamp_min(torch.finfo(own.dtype).tiny))
        if own.numel()
        else 0.0
    )
