"""Parts of Whisper: tokens of the language, hidden states of short clips, greedy writing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError, suggest

START, END = "<|startoftranscript|>", "<|endoftext|>"
FRAMES = 100  # of log-mel features a second
STRIDE = 2  # of the encoder's convolutions together


def prompt(tokenizer: Tokenizer, language: str | None) -> list[int]:
    """Returns the tokens after the start that ask for a transcript in a language, without times.

    Raises ConfigError for a language that the tokenizer lacks, and for a tokenizer without such tokens.
    """
    known = {t[2:-2]: i for t, i in tokenizer.get_vocab().items() if t.startswith("<|") and t.endswith("|>")}
    missing = [n for n in ("startoftranscript", "transcribe", "notimestamps", "endoftext") if n not in known]
    if missing:
        raise ConfigError(
            f"task 'speech-recognition' needs a Whisper model; its tokenizer lacks {missing[0]!r}"
        )
    names = [n for n in known if 2 <= len(n) <= 3 and n.isalpha()]
    if language is not None and language not in names:
        raise ConfigError(
            f"language must be one of the model's, such as 'en' or 'de', got {language!r}"
            f"{suggest(language, names, listed=False)}"
        )
    own = [known[language]] if language is not None else []
    return [*own, known["transcribe"], known["notimestamps"]]


def encoded(model: Any, features: Tensor) -> Any:
    """Returns the encoder's hidden states (b, t, d) of log-mel features (b, bins, 2 t).

    Whole windows go through the model's own forward. Shorter ones see the first positions alone: Whisper was
    trained on windows of 30 s, and reads short ones well once it is adapted to them.
    """
    encoder = model.get_encoder()
    whole = encoder.config.max_source_positions * STRIDE
    if features.shape[-1] >= whole:
        return encoder(features[..., :whole]).last_hidden_state
    h = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).transpose(1, 2)
    h = h + encoder.embed_positions.weight[: h.shape[1]]
    h = F.dropout(h, encoder.dropout, encoder.training)
    for layer in encoder.layers:
        h = layer(h, None)
    return encoder.layer_norm(h)


@torch.no_grad()
def greedy(model: Any, h: Tensor, start: Tensor, end: int, most: int) -> Tensor:
    """Returns the likeliest tokens (b, n) after the start (b, m); `end` fills the ends of rows.

    h: the encoder's hidden states (b, t, d). Tokens suppressed by the generation config are left out.
    """
    config = getattr(model, "generation_config", None)
    never = list(getattr(config, "suppress_tokens", None) or [])
    first = [*never, *(getattr(config, "begin_suppress_tokens", None) or [])]
    ids = start.to(h.device)
    open_, cache, found = torch.ones(len(h), dtype=torch.bool, device=h.device), None, []
    for step in range(most):
        out = model(encoder_outputs=(h,), decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        scores, cache = out.logits[:, -1].float(), out.past_key_values
        scores[:, first if step == 0 else never] = -torch.inf
        best = torch.where(open_, scores.argmax(-1), end)
        found.append(best)
        open_ = open_ & (best != end)
        if not open_.any():
            break
        ids = best[:, None]
    return torch.stack(found, 1)


def check(model: nn.Module) -> None:
    """Raises ConfigError unless the model is a Whisper model."""
    kind = type(model)
    if "WhisperPreTrainedModel" not in {c.__name__ for c in kind.__mro__}:
        raise ConfigError(f"task 'speech-recognition' needs a Whisper model, got a {kind.__name__}")
