"""Text-to-image: the squared error of a diffusion model's prediction, for pictures with captions.

The kinds of pipelines and their objectives: `models.diffusion`. Prior preservation: Ruiz et al. 2022,
https://arxiv.org/abs/2208.12242.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.forms.media import PICTURES, Media
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.tasks.base.abilities import Draws, Examined
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.task import Batch, Between, Task, batches, nothing
from veneer.tasks.senses import painting, pictures

PRIOR, PAINTED = "prior", 6
DRAWN = ("latents", "noise", "positions")  # in training, for each example
LATENTS = ("mean", "deviation", "weight", *DRAWN)  # the rest are conditions of a caption


class TextToImage(Task, Examined, Draws):
    """The prediction of noise or velocity. Examples are latents with the tokens of captions."""

    AUTO = "veneer.models.diffusion.Diffusion"
    PROCESSOR = "veneer.models.diffusion.DiffusionProcessor"
    PIPELINE = "text-to-image"
    METRIC: ClassVar[Metric] = Metric("noise_error", "squared error of the prediction")
    FORMS = {"image": ("image", "text"), "file": ("file_name", "text")}
    MEDIA = Media("image", "text", PICTURES, beside=".txt")
    SETTINGS = ()
    EXAMPLE = "picture"

    def __init__(
        self,
        processor: Any,
        reading: Reading,
        *,
        prior_weight: float = 1.0,
        guidance: float = 0.0,
        side: int = 0,
    ) -> None:
        """
        prior_weight: of pictures in a folder "prior" or with a column prior, which keep a class as it was
        guidance: scale of guidance for the report's pictures [0: 3.5 for Flux, else 5]
        side: pixels of a picture's side [0: the pipeline's own]
        """
        super().__init__(processor, reading)
        if prior_weight < 0:
            raise ConfigError(f"prior_weight must be 0 or more, got {prior_weight:g}")
        if guidance < 0:
            raise ConfigError(f"guidance must be 0 or more, got {guidance:g}")
        self.prior_weight, self.side = prior_weight, processor.side(side)
        self.guidance = guidance or processor.kind.GUIDANCE

    def encode(self, row: Row) -> Encoded:
        column = "image" if "image" in row.columns else "file_name"
        caption = row.columns["text"]
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{row.where}: 'text' must be the caption of the picture, got {caption!r}")
        x, frame = pictures.square(pictures.read(row, column), self.side)
        mean, deviation = self.processor.encoded(x * 2 - 1)
        named = isinstance(row.columns[column], str) and Path(row.columns[column]).parent.name == PRIOR
        weight = self.prior_weight if row.columns.get("prior") or named else 1.0
        content = {"mean": mean, "deviation": deviation, **self.processor.conditions(caption.strip(), frame)}
        return Encoded(row, {**content, "weight": torch.tensor(weight)})

    def conditions(self, caption: str) -> dict[str, Tensor]:
        """Returns the conditions of a whole picture of the training's size with this caption."""
        found: dict[str, Tensor] = self.processor.conditions(caption, self._whole())
        return found

    def _whole(self) -> tuple[int, ...]:
        return (self.side, self.side, 0, 0, self.side, self.side)

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        return [one.content]

    def size(self, example: dict[str, Tensor]) -> int:
        return 1

    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        return {key: torch.stack([e[key] for e in examples]) for key in examples[0]}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        times = torch.zeros(len(batch["ids"]), dtype=torch.long, device=batch["ids"].device)
        return {"latents": batch["mean"], "timesteps": times, **captions(batch)}

    def unused(self, model: nn.Module) -> list[str]:
        found: list[str] = self.processor.kind.unused(model)
        return found

    def check_adapted(self, model: nn.Module, examples: Sequence[Any]) -> None:
        self.processor.kind.check(model)

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        own = batch if "noise" in batch else {**batch, **self._draws(batch)}
        drawn = own["latents"], own["noise"], own["positions"]
        errors = self.errors(model, *drawn, captions(batch))
        return (errors * batch["weight"]).sum(), len(errors)

    def drawn(self, examples: Sequence[Any]) -> list[Any]:
        own = self._draws(self.collate(examples))
        return [{**e, **{name: own[name][i] for name in DRAWN}} for i, e in enumerate(examples)]

    def _draws(self, batch: Batch) -> dict[str, Tensor]:
        """Returns latents, noise and positions in the schedule of a training batch."""
        latents = batch["mean"] + batch["deviation"] * torch.randn_like(batch["mean"])
        positions = torch.randint(
            self.processor.kind.schedule.positions, (len(latents),), device=latents.device
        )
        return {"latents": latents, "positions": positions, "noise": torch.randn_like(latents)}

    def errors(
        self, model: Any, latents: Tensor, noise: Tensor, positions: Tensor, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """Returns the mean squared error (b,) of the prediction at these positions of the schedule."""
        schedule = self.processor.kind.schedule
        times = schedule.times(positions, self.processor.tokens(latents))
        noisy, target = schedule.noised(latents, noise, times)
        wanted: Tensor = target.float()
        like = next(p for p in model.parameters() if p.is_floating_point()).dtype
        found: Tensor = model(noisy.to(like), times, **conditions)
        return (found.float() - wanted).square().flatten(1).mean(1)

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        if not examples:
            raise DataError("the pictures to measure must be one or more, got 0")
        n, found, at = int(self.processor.kind.schedule.positions), [], 0
        with evaluating(model):
            for some, b in batches(self, model, examples, batch, between):
                # The same noise and positions at every evaluation, spread over the schedule.
                draws = [torch.Generator().manual_seed(at + i) for i in range(len(some))]
                noise = torch.stack(
                    [torch.randn(e["mean"].shape, generator=g) for e, g in zip(some, draws, strict=True)]
                )
                positions = torch.tensor([(n // 2 + 389 * (at + i)) % n for i in range(len(some))])
                x, place = b["mean"], b["mean"].device
                errors = self.errors(model, x, noise.to(place), positions.to(place), captions(b))
                found.append(errors.cpu())
                at += len(some)
        parts = torch.cat(found).double()
        return [Figure.of(self.METRIC, parts, torch.ones_like(parts))]

    def examined(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> dict[str, Any]:
        some = list(examples[:PAINTED])
        given = {**captions(self.collate(some)), **self._whole_frames(len(some))}
        painted = painting.paint(
            model, self.processor, given, self.conditions(""), guidance=self.guidance, side=self.side
        )
        truths = self.processor.decoded(torch.stack([e["mean"] for e in some]))
        texts = self.processor.tokenizer.batch_decode(given["ids"], skip_special_tokens=True)
        rows = [
            {
                "input": caption,
                "truth": {"image": pictures.as_uri(x)},
                "answer": {"image": pictures.as_uri(y)},
            }
            for caption, x, y in zip(texts, truths, painted, strict=True)
        ]
        return {"worst": rows}

    def _whole_frames(self, n: int) -> dict[str, Tensor]:
        """Returns the conditions of n whole pictures apart from their captions."""
        framed = self.processor.kind.framed(self._whole())
        return {key: frame.expand(n, -1) for key, frame in framed.items()}


def captions(batch: Batch) -> dict[str, Tensor]:
    """Returns the conditions of a batch: token ids, and further facts that the model takes."""
    return {key: value for key, value in batch.items() if key not in LATENTS}
