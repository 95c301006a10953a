"""Requests as the engine takes them, and the events it answers with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from veneer.errors import ConfigError

MAX_STOPS, MAX_STOP_LENGTH, MAX_LOGPROBS, MAX_BIASES = 16, 256, 20, 1024


@dataclass(frozen=True)
class Sampling:
    """Rules for choosing tokens and ending an answer.

    temperature: 0 takes the likeliest token; top_k: 0 for all tokens; top_p, min_p: bounds on probabilities;
    logprobs: None, or how many of the likeliest tokens to report beside the chosen one; stop: texts that end
    the answer and are cut off; prompt_logprobs: report each prompt token's log-probability too.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def check(self) -> None:
        """Raises ConfigError that names every value out of its range."""
        ranges = {
            "max_tokens": (self.max_tokens, 0, math.inf),
            "temperature": (self.temperature, 0, 100),
            "top_p": (self.top_p, 1e-9, 1),
            "top_k": (self.top_k, 0, math.inf),
            "min_p": (self.min_p, 0, 1),
            "presence_penalty": (self.presence_penalty, -2, 2),
            "frequency_penalty": (self.frequency_penalty, -2, 2),
            "repetition_penalty": (self.repetition_penalty, 1e-2, 100),
            "logprobs": (self.logprobs or 0, 0, MAX_LOGPROBS),
            "len(stop)": (len(self.stop), 0, MAX_STOPS),
            "len(logit_bias)": (len(self.logit_bias), 0, MAX_BIASES),
        }
        problems = [
            f"{name} must be from {low:g} to {high:g}, got {value}"
            for name, (value, low, high) in ranges.items()
            if not low <= value <= high
        ]
        problems += [
            f"stop must hold texts of 1 to {MAX_STOP_LENGTH} characters, got one of {len(s)}"
            for s in self.stop
            if not 0 < len(s) <= MAX_STOP_LENGTH
        ]
        problems += [
            f"logit_bias must be from -100 to 100, got {b}"
            for b in self.logit_bias.values()
            if not -100 <= b <= 100
        ]
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def is_greedy(self) -> bool:
        """True if the likeliest token is taken."""
        return self.temperature == 0


class Alternative(NamedTuple):
    """A token with its log-probability."""

    token: int
    logprob: float


class Logprob(NamedTuple):
    """The chosen token's log-probability and the likeliest tokens'; NaN for a prompt's first token."""

    token: int
    logprob: float
    top: tuple[Alternative, ...] = ()


class Tokens(NamedTuple):
    """New tokens of an answer and the text that is certain by now."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()


class Prompt(NamedTuple):
    """Log-probabilities of the prompt's tokens."""

    logprobs: tuple[Logprob, ...]


class Finished(NamedTuple):
    """The end of an answer. reason: "stop", "length" or "cancelled"; cached: prompt tokens taken from the
    prefix cache.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached: int


class Failed(NamedTuple):
    """An answer that cannot be completed. code: of the error, as the HTTP interface reports it."""

    code: str
    message: str


Event = Tokens | Prompt | Finished | Failed
Sink = Callable[[Event], None]
