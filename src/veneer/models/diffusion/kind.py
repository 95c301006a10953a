"""The interface of a kind of pipeline: its parts, the states of captions, the prediction, the schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.models.diffusion.schedule import Schedule

Conditions = Mapping[str, Tensor]  # of captions: token ids by tokenizer, and further facts
States = dict[str, Tensor]  # of the text encoders, as the denoiser takes them
Predict = Callable[[Tensor, Tensor], Tensor]  # (noisy latents, times) -> prediction


class Kind(ABC):
    """One kind of pipeline. Its file in `kinds` is its entry.

    PARTS: classes of the parts that adapters change, by diffusers' names; the first predicts.
    TOKENIZERS: classes of transformers by part. PATCH: latents that a token spans, by side.
    GUIDANCE: scale of guidance for pictures.
    """

    PIPELINE: ClassVar[str]
    PARTS: ClassVar[Mapping[str, str]]
    TOKENIZERS: ClassVar[Mapping[str, str]]
    SCHEDULE: ClassVar[type[Schedule]]
    PATCH: ClassVar[int] = 1
    GUIDANCE: ClassVar[float] = 5.0

    def __init__(self, schedule: Schedule, index: Mapping[str, Any]) -> None:
        """Takes the schedule and the pipeline's index (model_index.json)."""
        self.schedule, self.index = schedule, index

    @abstractmethod
    def side(self, predictor: Mapping[str, Any], vae: Any) -> int:
        """Returns the pixels of a picture's side, from the configurations of the predictor and the VAE."""

    @abstractmethod
    def states(self, model: Any, conditions: Conditions) -> States:
        """Returns the states of captions. Conditions: token ids (b, n) by `ids`, `ids_2`, .."""

    @abstractmethod
    def prediction(
        self, model: Any, noisy: Tensor, times: Tensor, states: States, guidance: float = 1.0
    ) -> Tensor:
        """Returns the prediction (b, c, h, w) for noisy latents (b, c, h, w) and times (b,)."""

    def framed(self, frame: tuple[int, ...]) -> dict[str, Tensor]:
        """Returns what the model takes of a picture's height, width, cut from the top and from the left, and
        its height and width after the cut."""
        return {}

    def unused(self, model: nn.Module) -> list[str]:
        """Returns modules that all-linear leaves out: no prediction depends on them, or programs cannot open
        adapters of them."""
        return []

    def check(self, model: Any) -> None:
        """Raises ConfigError if an adapter changes layers that no program opens adapters of."""
        return

    def channels(self, predictor: Mapping[str, Any]) -> int:
        """Returns the channels of latents that the predictor takes."""
        return int(predictor["in_channels"]) // self.PATCH**2

    def guided(self, model: Any, conditions: Conditions, empty: Conditions, guidance: float) -> Predict:
        """Returns the prediction under classifier-free guidance, with the states computed once.

        empty: conditions of the empty caption. Ho and Salimans 2022, https://arxiv.org/abs/2207.12598.
        """
        n = len(conditions["ids"])
        joined = {k: torch.cat([empty[k].expand_as(v), v]) for k, v in conditions.items()}
        states = self.without_caption(self.states(model, joined), n)

        def predict(x: Tensor, times: Tensor) -> Tensor:
            found = self.prediction(model, torch.cat([x, x]), torch.cat([times, times]), states)
            plain, with_caption = found.float().chunk(2)
            return plain + guidance * (with_caption - plain)

        return predict

    def without_caption(self, states: States, n: int) -> States:
        """Returns the states with the first n rows, those of the empty caption, as the pipeline has them."""
        return states


def layers(model: nn.Module, *leads: str) -> list[str]:
    """Returns modules without children, apart from embeddings, whose names begin with one of `leads`."""
    named = ((n, m) for n, m in model.named_modules() if n.startswith(leads))
    return [n for n, m in named if not isinstance(m, nn.Embedding) and not [*m.children()]]
