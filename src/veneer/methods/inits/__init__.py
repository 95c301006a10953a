"""Starts of a low-rank pair: one file, one function `start`; the file's name is the start's name.

The options of a start are the keyword parameters of its `start(s, *, ..)`, given together as `init_options`.
The file also has `alpha(rank, stabilised)`, the default alpha, and `NEEDS`, its input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from veneer.errors import ConfigError, not_finite, suggest
from veneer.methods.base.needs import Needs
from veneer.methods.base.stats import Stats
from veneer.ops.matrix.linalg import leading_svd
from veneer.ops.matrix.sketch import Svd
from veneer.registry import Registry

STARTS = Registry(__name__, "init")
Options = Mapping[str, float | str]


class Start(NamedTuple):
    """The inputs of a start.

    W: (out, in); scaling: s; draw: its own random generator; lookup: True if x holds token ids; stats: from
    calibration.
    """

    W: Tensor
    rank: int
    scaling: float
    draw: torch.Generator
    lookup: bool = False
    stats: Stats | None = None

    def of_tokens(self) -> tuple[Tensor, Tensor]:
        """Returns A = 0 (r, in) and a drawn B (out, r): the start for token ids, of which every one can
        learn."""
        out, in_ = self.W.shape
        return self.W.new_zeros(self.rank, in_), torch.randn(out, self.rank, generator=self.draw).to(self.W)

    def gradient(self, rank: int) -> Svd:
        """Returns the leading `rank` triplets (at most all) of the loss's gradient in W. Raises ConfigError
        without them."""
        if self.stats is None or self.stats.gradient is None:
            raise ConfigError(
                "this init starts from the loss's gradient, which is missing; calibrate first:"
                " stats = veneer.calibrate(model, batches, rank=..), then veneer.attach(.., stats=stats)"
            )
        found, wanted = self.stats.gradient, min(rank, *self.W.shape)
        there = (len(found.U), found.Vh.shape[1])
        if there != self.W.shape:
            raise ConfigError(
                f"the statistics are of a layer {there}, this layer is {tuple(self.W.shape)};"
                f" calibrate on this model"
            )
        if len(found.S) < wanted:
            raise ConfigError(
                f"calibrated for rank {len(found.S) // 2}, the rank here is {self.rank};"
                f" calibrate with rank={self.rank}"
            )
        return Svd(*(t.to(self.W) for t in (found.U[:, :rank], found.S[:rank], found.Vh[:rank])))

    def inputs(self, kind: Literal["inputs", "oriented"]) -> tuple[Svd, ...]:
        """Returns a statistic of the layer's inputs for the rank. Raises ConfigError without one."""
        found: tuple[Svd, ...] | None = None if self.stats is None else getattr(self.stats, kind)
        if found is None:
            raise ConfigError(
                "this init starts from the layer's inputs, which are missing; calibrate first:"
                " stats = veneer.calibrate(model, batches, rank=.., inputs=True), then"
                " veneer.attach(.., stats=stats); grouped convolutions have no such statistic"
            )
        known = min(len(part.S) for part in found)
        if known < self.rank:
            raise ConfigError(
                f"calibrated for rank {known}, the rank here is {self.rank}; calibrate with rank={self.rank}"
            )
        return tuple(Svd(*(t.to(self.W) for t in part)) for part in found)

    def leading(self) -> Svd:
        """Returns the leading triplets of W, as many as the rank."""
        if self.stats is not None and self.stats.leading is not None:
            return self.stats.leading
        return Svd(*leading_svd(self.W, self.rank, self.draw))

    def residual(self) -> tuple[Tensor, Tensor]:
        """Returns A (r, in), B (out, r) with s B A the quantisation residual. Raises ConfigError without
        one."""
        if self.stats is None or self.stats.residual is None:
            raise ConfigError(
                "this init starts from the quantisation error of W, which is missing; quantise for it first:"
                " stats = veneer.quantise_around(model, 'nf4', start=.., rank=..),"
                " then veneer.attach(.., stats=stats)"
            )
        U, S, Vh = (t.to(self.W) for t in self.stats.residual)
        if (len(U), len(S), Vh.shape[1]) != (len(self.W), self.rank, self.W.shape[1]):
            raise ConfigError(
                f"the base was quantised for rank {len(S)} on {len(U)} x {Vh.shape[1]},"
                f" the rank here is {self.rank}; use that rank"
            )
        root = (S / self.scaling).sqrt()
        return root[:, None] * Vh, U * root


Init = Callable[..., tuple[Tensor, Tensor]]  # (Start, *, options) -> A (r, in), B (out, r)


def available() -> list[str]:
    """Returns the names of all starts."""
    return STARTS.names()


def get(name: str) -> ModuleType:
    """Returns the module of a start. Raises ConfigError for an unknown one."""
    return STARTS.module(name)


def needs(name: str) -> Needs:
    """Returns the input that a start needs. Raises ConfigError for an unknown one."""
    found: Needs = get(name).NEEDS
    return found


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Returns the options of a start with their types, float or str, and defaults."""
    parameters = inspect.signature(get(name).start, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def check(name: str, options: Options | None) -> None:
    """Raises ConfigError for an unknown start, and for all unknown options, values of the wrong type and
    infinite ones."""
    known, problems = options_of(name), []
    for option, value in (options or {}).items():
        if option not in known:
            hint = suggest(option, known) if known else "; it takes no options"
            problems.append(f"init {name!r} has no option {option!r}{hint}")
        elif (known[option].annotation is str) != isinstance(value, str):
            kind = "a word" if known[option].annotation is str else "a number"
            problems.append(f"init_options: {option} must be {kind}, got {value!r}")
    problems += [f"init_options: {problem}" for problem in not_finite(options or {})]
    if problems:
        raise ConfigError("\n".join(problems))
