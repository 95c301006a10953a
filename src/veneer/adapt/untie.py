"""Gives modules that share a parameter copies of their own, so that a change of one reaches no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from veneer.methods import Delta
from veneer.methods.base.token_rows import TokenRows
from veneer.sites import Site


class Ties:
    """The ties that were cut, to tie them again."""

    def __init__(self) -> None:
        self._cut: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._configs: list[Any] = []

    @torch.no_grad()
    def cut(self, model: nn.Module, together: Sequence[nn.Module]) -> None:
        """Gives modules that change together parameters that no other module of the model holds.

        The transformers configuration then says "not tied"; else the merged model would lose its change when
        opened.
        """
        for p in list(together[0].parameters(recurse=False)):
            holders = [m for m in model.modules() if any(q is p for q in m._parameters.values())]
            if all(any(m is t for t in together) for m in holders):
                continue
            copy = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            for m in together:
                for name in [n for n, q in m._parameters.items() if q is p]:
                    m._parameters[name] = copy
                    self._cut.append((m, name, p))
            for config in _tied_configs(model):
                config.tie_word_embeddings = False
                self._configs.append(config)

    def restore(self) -> None:
        """Ties everything again; what was written to the copies is lost."""
        for module, name, p in reversed(self._cut):
            module._parameters[name] = p
        for config in self._configs:
            config.tie_word_embeddings = True


Own = Sequence[tuple[Delta, float]]  # the deltas of one layer with their strengths


def is_twin(site: Site, own: Own, other: Site, others: Own) -> bool:
    """Returns True if two layers share parameters and changes: whole modules, or rows of tokens."""
    if [s for _, s in own] != [t for _, t in others]:
        return False
    rows = [
        (d.D, e.D)
        for (d, _), (e, _) in zip(own, others, strict=True)
        if isinstance(d, TokenRows) and isinstance(e, TokenRows)
    ]
    if rows and len(rows) == len(own):
        tied = site.module.weight is other.module.weight
        return tied and all(D is E for D, E in rows)
    theirs, ours = ([*s.module.parameters(recurse=False)] for s in (site, other))
    if {site.kind, other.kind} != {"leaf"} or len(theirs) != len(ours):
        return False
    shared = all(p is q for p, q in zip(theirs, ours, strict=True))
    pairs = zip(own, others, strict=True)
    return shared and all(torch.equal(a.delta(site), b.delta(other)) for (a, _), (b, _) in pairs)


def _tied_configs(model: Any) -> list[Any]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    known = {id(c): c for c in (config, text) if c is not None}
    return [c for c in known.values() if getattr(c, "tie_word_embeddings", False)]
