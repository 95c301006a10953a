"""Text-to-image diffusion: the squared error of the predicted noise, for pictures with captions.

Ho et al. 2020, https://arxiv.org/abs/2006.11239; prior preservation: Ruiz et al. 2022,
https://arxiv.org/abs/2208.12242.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.forms.media import PICTURES, Media
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.tasks.base.abilities import Examined
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.task import Batch, Between, Task, batches, nothing
from veneer.tasks.senses import painting, pictures

PRIOR, PAINTED = "prior", 6


class TextToImage(Task, Examined):
    """Noise prediction of Stable Diffusion. Examples are latents with the tokens of captions."""

    AUTO = "veneer.models.diffusion.Diffusion"
    PROCESSOR = "veneer.models.diffusion.DiffusionProcessor"
    PIPELINE = "text-to-image"
    METRIC: ClassVar[Metric] = Metric("noise_error", "squared error of the noise")
    FORMS = {"image": ("image", "text"), "file": ("file_name", "text")}
    MEDIA = Media("image", "text", PICTURES, beside=".txt")
    SETTINGS = ()
    EXAMPLE = "picture"

    def __init__(
        self, processor: Any, reading: Reading, *, prior_weight: float = 1.0, guidance: float = 5.0
    ) -> None:
        """
        prior_weight: of pictures in a folder "prior" or with a column prior, which keep a class as it was
        guidance: scale of classifier-free guidance for the report's pictures
        """
        super().__init__(processor, reading)
        if prior_weight < 0:
            raise ConfigError(f"prior_weight must be 0 or more, got {prior_weight:g}")
        self.prior_weight, self.guidance = prior_weight, guidance

    def encode(self, row: Row) -> Encoded:
        column = "image" if "image" in row.columns else "file_name"
        caption = row.columns["text"]
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{row.where}: 'text' must be the caption of the picture, got {caption!r}")
        x = pictures.square(pictures.read(row, column), self.processor.size)
        mean, deviation = self.processor.encoded(x * 2 - 1)
        named = isinstance(row.columns[column], str) and Path(row.columns[column]).parent.name == PRIOR
        weight = self.prior_weight if row.columns.get("prior") or named else 1.0
        content = {"mean": mean, "deviation": deviation, "ids": self.ids(caption.strip())}
        return Encoded(row, {**content, "weight": torch.tensor(weight)})

    def ids(self, caption: str) -> Tensor:
        """Returns the tokens of a caption, cut and padded to the text encoder's length."""
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        length = self.processor.tokenizer.model_max_length
        found: Tensor = self.processor.tokenizer(caption, max_length=length, **options)["input_ids"][0]
        return found

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        return [one.content]

    def size(self, example: dict[str, Tensor]) -> int:
        return 1

    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        return {
            key: torch.stack([e[key] for e in examples]) for key in ("mean", "deviation", "ids", "weight")
        }

    def inputs(self, batch: Batch) -> dict[str, Any]:
        times = torch.zeros(len(batch["ids"]), dtype=torch.long, device=batch["ids"].device)
        return {"latents": batch["mean"], "timesteps": times, "input_ids": batch["ids"]}

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        latents = batch["mean"] + batch["deviation"] * torch.randn_like(batch["mean"])
        steps = int(self.processor.scheduler.config.num_train_timesteps)
        times = torch.randint(steps, (len(latents),), device=latents.device)
        errors = self.errors(model, latents, torch.randn_like(latents), times, batch["ids"])
        return (errors * batch["weight"]).sum(), len(errors)

    def errors(self, model: Any, latents: Tensor, noise: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        """Returns the mean squared error (b,) of the prediction for noisy latents at these times."""
        scheduler = self.processor.scheduler
        noisy = scheduler.add_noise(latents, noise, times)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, times) if velocity else noise
        like = next(p for p in model.parameters() if p.is_floating_point()).dtype
        found: Tensor = model(noisy.to(like), times, ids)
        return (found.float() - target.float()).square().flatten(1).mean(1)

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
        steps, found, at = int(self.processor.scheduler.config.num_train_timesteps), [], 0
        with evaluating(model):
            for some, b in batches(self, model, examples, batch, between):
                # The same noise and times at every evaluation, spread over the schedule.
                draws = [torch.Generator().manual_seed(at + i) for i in range(len(some))]
                noise = torch.stack(
                    [torch.randn(e["mean"].shape, generator=g) for e, g in zip(some, draws, strict=True)]
                )
                times = torch.tensor([(steps // 2 + 389 * (at + i)) % steps for i in range(len(some))])
                place = b["mean"].device
                found.append(self.errors(model, b["mean"], noise.to(place), times.to(place), b["ids"]).cpu())
                at += len(some)
        parts = torch.cat(found).double()
        return [Figure.of(self.METRIC, parts, torch.ones_like(parts))]

    def examined(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> dict[str, Any]:
        some = list(examples[:PAINTED])
        ids = torch.stack([e["ids"] for e in some])
        painted = painting.paint(model, self.processor, ids, self.ids(""), self.guidance)
        truths = self.processor.decoded(torch.stack([e["mean"] for e in some]))
        captions = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rows = [
            {
                "input": caption,
                "truth": {"image": pictures.as_uri(x)},
                "answer": {"image": pictures.as_uri(y)},
            }
            for caption, x, y in zip(captions, truths, painted, strict=True)
        ]
        return {"worst": rows}
