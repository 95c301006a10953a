"""Chosen rows of an embedding, or of a head: W' = W + D at these tokens, bit for bit W elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from veneer.methods.base.delta import FactoredDelta
from veneer.methods.base.factors import Factors
from veneer.sites import Site


@final
class TokenRows(FactoredDelta):
    """D (n, d): the trained rows minus the base's. A tied embedding and head hold one D together.

    tokens: the numbers of the rows; words: the tokens' texts, if they are known. The site is an embedding,
    W (d, vocabulary), or a head, (vocabulary, d).
    """

    ids: Tensor

    def __init__(self, site: Site, D: nn.Parameter, tokens: Sequence[int], words: Sequence[str] = ()) -> None:
        super().__init__()
        self.D, self.tokens = D, list(tokens)
        self.options = {"tokens": self.tokens, "words": list(words)}
        self.register_buffer("ids", torch.tensor(self.tokens, device=site.device), persistent=False)

    def factors(self, site: Site) -> Factors:
        of_tokens = site.kind == "embedding"
        marks = self.D.new_zeros(len(self.tokens), site.in_ if of_tokens else site.out)
        marks[torch.arange(len(self.tokens), device=marks.device), self.ids] = 1
        return Factors(marks, self.D.mT) if of_tokens else Factors(self.D, marks.mT)

    def rows(self, site: Site) -> Tensor:
        """Returns the rows W' (n, d) of these tokens."""
        W = site.weight().detach()
        own = (W.mT if site.kind == "embedding" else W)[self.ids]
        return own.to(self.D) + self.D.detach()
