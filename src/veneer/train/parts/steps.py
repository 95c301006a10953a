"""Settings of the optimiser and of the steps that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer import optim
from veneer.errors import ConfigError, option
from veneer.settings import Range, Settings, about, setting
from veneer.train.parts.options import unsuitable


@dataclass(frozen=True, kw_only=True)
class Updates(Settings):
    """The optimiser, its rates and its options."""

    PANEL = "Optimiser"

    optimiser: str = setting("adamw", f"optimiser: {', '.join(optim.available())}")
    optimiser_options: dict[str, Any] = field(
        default_factory=dict, metadata=about("the optimiser's own options, such as LoRA+'s ratio")
    )
    lr: float | None = setting(
        None, "peak learning rate (of A, under LoRA+); depends on model, method and optimiser unless given"
    )
    embedding_lr: float | None = setting(None, "peak learning rate of embeddings; lr unless given")
    weight_decay: float = setting(0.0, "decay: W, or the product B A, shrinks by (1 - rate * decay) a step")
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "AdamW's decay rates of the gradient's mean and square"
    )
    clip: float = setting(1.0, "largest norm of the whole gradient; 0: no clipping")
    label_smoothing: float = setting(
        0.0, "share of each label spread over all classes in training, not in evaluations"
    )

    neftune: float = setting(0.0, "NEFTune's alpha: noise on embeddings in training, usually 5; 0: no noise")
    attention_dropout: float = setting(0.0, "share of attention weights dropped in training")
    ema: float = setting(
        0.0, "decay of a running mean of the trained weights, measured and saved in their place; 0: no mean"
    )

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every unknown name, unsuitable option and value out of range."""
        yield from Range("above 0", ("lr", "embedding_lr"), 0, open=True).problems(self)
        yield from Range("0 or more", ("weight_decay", "clip", "neftune"), 0).problems(self)
        yield from Range("in [0, 1)", ("label_smoothing", "ema", "attention_dropout"), 0, 1).problems(self)
        if not all(0 <= b < 1 for b in self.betas):
            yield f"{option('betas')} must both be in [0, 1), got {self.betas}"
        try:
            known = optim.options_of(self.optimiser)
        except ConfigError as e:
            yield e.text
            return
        yield from unsuitable(f"optimiser {self.optimiser!r}", self.optimiser_options, known)


@dataclass(frozen=True, kw_only=True)
class Steps(Settings):
    """The length of the training, its batches and its schedule."""

    PANEL = "Schedule"

    steps: int | None = setting(None, "length of the training", unit="steps")
    epochs: float | None = setting(
        None, "length of the training if steps is not given; 1 unless given", unit="passes over data"
    )
    batch: int = setting(8, "examples (windows of text) in one forward pass", unit="examples")
    accumulate: int = setting(1, "forward passes a step", unit="passes")
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "shape of the rate after warm-up")
    warmup: float = setting(
        0.05, "length of the rate's straight rise: a share of the steps, or steps if 1 or more"
    )
    seed: int = setting(0, "seed of starts, order, dropout and the split of data")

    def rising(self, steps: int) -> int:
        """Returns the steps of the rate's rise in a training of so many; one step at least follows it."""
        return min(int(self.warmup), steps - 1) if self.warmup >= 1 else round(self.warmup * steps)

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range or contradiction."""
        yield from Range("above 0", ("epochs",), 0, open=True).problems(self)
        yield from Range("0 or more", ("seed",), 0).problems(self)
        yield from Range("1 or more", ("steps", "batch", "accumulate"), 1).problems(self)
        yield from Range("0 or more", ("warmup",), 0).problems(self)
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            wanted = "a share below 1 or a whole number of steps"
            yield f"{option('warmup')} must be {wanted}, got {self.warmup:g}"
        if self.steps is not None and self.warmup >= max(1, self.steps):
            got = f"{self.warmup:g} and {self.steps}"
            yield f"{option('warmup')} must be less than {option('steps')}, got {got}"
        if self.steps is not None and self.epochs is not None:
            got = f"{self.steps} and {self.epochs:g}"
            yield f"{option('steps')} and {option('epochs')} both set the length, got {got}; give one of them"
