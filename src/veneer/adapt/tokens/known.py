"""Reads from veneer.json which new tokens an adapter has, and finds those that a model lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from veneer.errors import first_few
from veneer.sites.roles import embeddings


def new_tokens(record: Mapping[str, Any] | None) -> dict[str, int]:
    """Returns {token: id} of the tokens that were new in the adapter's training."""
    options = [site["options"] for site in record["sites"].values()] if record else []
    found = next((o for o in options if o.get("words")), None)
    return dict(zip(found["words"], found["tokens"], strict=True)) if found else {}


def missing(model: nn.Module, record: Mapping[str, Any] | None) -> list[str]:
    """Returns a sentence on new tokens for which the model's embedding has no row; [] if it has all."""
    tokens, inputs = new_tokens(record), embeddings(model, "input")
    rows: Any = getattr(inputs, "weight", None)
    if not tokens or rows is None or max(tokens.values()) < len(rows):
        return []
    needed = max(tokens.values()) + 1
    return [
        f"the adapter has the new tokens {first_few(tokens)}, for which the model lacks rows ({len(rows)} of"
        f" {needed}); call veneer.resize_vocabulary(model, {needed}) first, and for a server export the"
        " merged model"
    ]
