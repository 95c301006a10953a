"""Tasks for tests that need no model's own tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from veneer.data.reading import Reading
from veneer.tasks.causal_lm import CausalLM


def causal_lm(tokenizer: Any = None, *, pad: int = 0, **reading: Any) -> CausalLM:
    """Returns the language model's task; without a tokenizer, one that knows nothing but padding."""
    return CausalLM(tokenizer or SimpleNamespace(pad_token_id=pad), Reading(**reading))
