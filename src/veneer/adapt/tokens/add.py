"""Adds tokens to a model and its tokenizer; an adapter trains their rows of embedding and head alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt import calls, hooks, switch
from veneer.adapt.attached import Changes, adapters, deltas_of
from veneer.adapt.tokens import words
from veneer.errors import first_few
from veneer.methods.base.delta import master_dtype
from veneer.methods.base.token_rows import TokenRows
from veneer.sites import Site, site_for
from veneer.sites.own import base_modules
from veneer.sites.roles import embeddings


@torch.no_grad()
def add_tokens(
    model: nn.Module, tokenizer: Any, tokens: Sequence[str], *, name: str = "default"
) -> dict[str, int]:
    """Adds tokens to the tokenizer and the model, trains their rows as a part of adapter `name`; returns ids.

    Embedding and head grow by rows of zeros, and the adapter's rows start at the mean of the others. A tied
    head stays tied. The adapter must be attached already, beside embedding and head. Raises ConfigError,
    before anything is changed, for tokens that exist.

    >>> veneer.attach(model, "lora", rank=8)
    >>> veneer.add_tokens(model, tokenizer, ["<call>", "</call>"])
    """
    words.refuse([*words.problems(tokenizer, tokens), *_unfit(model, name)])
    ids = words.put(tokenizer, tokens)
    train_rows(model, ids, name)
    return ids


@torch.no_grad()
def train_rows(model: nn.Module, ids: Mapping[str, int], name: str = "default") -> None:
    """Trains the rows of these tokens, {token: id}, as a part of adapter `name`; the model grows.

    Raises ConfigError, before anything is changed, if embedding or head is adapted already.
    """
    words.refuse(_unfit(model, name))
    resize_vocabulary(model, max(ids.values()) + 1)
    hooks.hang(model, name, _changes(model, ids))
    switch.train_only(model, name)
    calls.watch(model)


@torch.no_grad()
def resize_vocabulary(model: nn.Module, rows: int) -> nn.Module:
    """Lengthens embedding and head to `rows` tokens by rows of zeros and returns the model.

    A model that is long enough stays as it was. Load an adapter with added tokens after it.

    >>> veneer.load(veneer.resize_vocabulary(model, len(tokenizer)), "out/calls")
    """
    own: Any = model
    before = _ends(model)[0].weight().shape[1]
    if rows > before:
        own.resize_token_embeddings(rows, mean_resizing=False)
        for site in _ends(model):
            weight: Tensor = site.module.weight
            weight[before:] = 0
            if getattr(site.module, "bias", None) is not None:
                site.module.bias[before:] = 0
    return model


def _ends(model: nn.Module) -> list[Site]:
    """Returns the sites of the embedding and, if there is one, of the head."""
    own = [embeddings(model, end) for end in ("input", "output")]
    found = {id(m): (n, m) for n, m in base_modules(model).items()}
    return [site_for(*found[id(m)]) for m in own if id(m) in found]


def _changes(model: nn.Module, ids: Mapping[str, int]) -> Changes:
    """Returns the trained rows of embedding and head; a tied head shares those of the embedding."""
    made: Changes = []
    shared: dict[int, nn.Parameter] = {}
    rows = list(ids.values())
    for site in _ends(model):
        W: Tensor = site.module.weight.detach().to(master_dtype(site))
        D = shared.get(id(site.module.weight))
        if D is None:
            kept = torch.ones(len(W), dtype=torch.bool, device=W.device)
            kept[rows] = False
            D = nn.Parameter(W[kept].mean(0) - W[rows])
            shared[id(site.module.weight)] = D
        made.append((site, TokenRows(site, D, rows, list(ids))))
    return made


def _unfit(model: nn.Module, name: str) -> list[str]:
    """Returns the reasons why adapter `name` of the model cannot train rows of tokens."""
    problems = []
    if name not in adapters(model):
        problems.append(f"name must be an attached adapter, got {name!r}; attach one first")
    if embeddings(model, "input") is None:
        problems.append(f"model must have an embedding of tokens, got a {type(model).__name__}")
    else:
        there = [s.name for s in _ends(model) if deltas_of(s.module) is not None]
        if there:
            problems.append(f"{first_few(there)} must have no adapter, got one; leave them out with exclude=")
    return problems
