"""Settings of the base model and of the change that is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from veneer import dtypes, methods, tasks
from veneer.adapt.tokens.words import spelling
from veneer.errors import ConfigError, option
from veneer.methods import inits
from veneer.ops.matrix.linalg import multiplies_bf16
from veneer.settings import Range, Settings, about, setting
from veneer.train.parts.options import unsuitable

FULL = "full"  # the method that trains the base itself


@dataclass(frozen=True, kw_only=True)
class Base(Settings):
    """The base model, its task, and the numbers that it computes with."""

    PANEL = "Model"

    model: str = setting("builtin", "base model: a Hugging Face folder or id, or builtin")
    task: str = setting(tasks.DEFAULT, f"task to train for: {', '.join(tasks.available())}")
    task_options: dict[str, Any] = field(default_factory=dict, metadata=about("the task's own options"))
    precision: Literal["auto", "bf16", "fp32", "bfloat16", "float32"] = setting(
        "auto",
        "bf16: adapters on a bfloat16 base; full keeps float32 weights under autocast."
        " auto: bf16 where the processor supports it",
    )
    quantise: Literal["nf4", "int8", "spqr"] | None = setting(
        None, "keep the frozen base's linear layers in 4 to 8 bits a number (QLoRA): nf4, int8 or spqr"
    )
    device: str = setting("auto", "device to compute on: cpu, cuda, cuda:1, ..; auto: cuda if available")

    def precision_on(self, device: torch.device) -> Literal["bf16", "fp32"]:
        """Returns the precision that a training on `device` has."""
        narrow = multiplies_bf16(device) if self.precision == "auto" else self.precision == "bf16"
        return "bf16" if narrow else "fp32"

    def problems(self) -> Iterator[str]:
        """Yields a sentence for an unknown task, and for every unsuitable option of a known one."""
        try:
            known = tasks.options_of(self.task)
        except ConfigError as e:
            yield e.text
            return
        yield from unsuitable(f"task {self.task!r}", self.task_options, known)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "precision", dtypes.in_short(self.precision))


@dataclass(frozen=True, kw_only=True)
class Change(Settings):
    """The method, its layers and its options."""

    PANEL = "Method"

    method: str = setting("lora", "method of adaptation, or full to train all parameters")
    to: str | tuple[str, ...] | None = setting(
        None,
        "layers to adapt: all-linear, a regular expression, or names and endings of names;"
        " the method's own choice unless given",
    )
    exclude: str | tuple[str, ...] = setting((), "layers to leave out, as in to")
    untie: bool = setting(False, "adapt layers that share their weight with another one")
    options: dict[str, Any] = field(
        default_factory=dict, metadata=about("the method's own options, such as rank and alpha")
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata=about("other ranks, by ending or pattern of a layer's name")
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata=about("other alphas, by ending or pattern of a layer's name")
    )
    add_tokens: tuple[str, ...] = setting(
        (), "new tokens for tokenizer, embedding and head; their rows alone are trained beside the adapter"
    )
    calibration: int = setting(
        64, "examples of data to collect statistics from for a start such as loraga", unit="examples"
    )
    trp: float | None = setting(
        None, "with method full: train into low rank, until linear layers keep this share of their parameters"
    )
    trp_every: int = setting(20, "length between projections to low rank", unit="steps")

    @property
    def trains_base(self) -> bool:
        """Says that the base's own parameters are trained, without an adapter."""
        return self.method == FULL

    @property
    def init(self) -> str | None:
        """Returns the start of the method's factors, None for a method without starts. Raises ConfigError."""
        known = methods.options_of(methods.get(self.method))
        return str(self.options.get("init", known["init"].default)) if "init" in known else None

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every unknown name, unsuitable option and contradiction."""
        yield from Range("1 or more", ("calibration", "trp_every"), 1).problems(self)
        yield from Range("above 0 and at most 1", ("trp",), 0, 1 + 1e-12, open=True).problems(self)
        if self.trp is not None and not self.trains_base:
            full = option("method", "full")
            trp = option("trp", self.trp)
            yield f"{trp} projects the weights that {full} trains; add it, or leave trp out"
        if self.add_tokens:
            yield from (f"{option('add_tokens')}: {sentence}" for sentence in spelling(self.add_tokens))
        try:
            known = methods.options_of(methods.get(self.method))
        except ConfigError as e:  # nothing else can be checked
            yield e.text
            return
        wrong = list(unsuitable(f"method {self.method!r}", self.options, known))
        yield from wrong
        if "init" in known and not wrong:
            try:
                inits.check(self.options.get("init", known["init"].default), self.options.get("init_options"))
            except ConfigError as e:
                yield from e.text.splitlines()
        for pattern, needed in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
            if getattr(self, pattern) and needed not in known:
                lacks = f"which method {self.method!r} lacks"
                yield f"{option(pattern)} needs an option {needed!r}, {lacks}; leave it out"
