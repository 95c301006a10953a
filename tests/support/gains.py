"""A method for tests with all parts of the normal form."""

from __future__ import annotations

import torch
from torch import nn

from veneer.methods import FactoredDelta, Factors
from veneer.methods.base.delta import master_dtype
from veneer.methods.base.protocols import GainsInput


class Gains(FactoredDelta, GainsInput):
    """All four parts of the form, each of which can be left out."""

    def __init__(self, site, *, parts: str = "ABgc"):
        super().__init__()
        like = {"dtype": master_dtype(site), "device": site.weight().device}
        self.A = nn.Parameter(torch.zeros(2, site.in_, **like))
        self.B = nn.Parameter(torch.zeros(site.out, 2, **like))
        self.g = nn.Parameter(torch.ones(site.out, **like)) if "g" in parts else None
        self.c = nn.Parameter(torch.ones(site.in_, **like)) if "c" in parts else None
        self.parts = parts

    def factors(self, site):
        A, B = (self.A, self.B) if "AB" in self.parts else (self.A[:0], self.B[:, :0])
        return Factors(A, B, self.g, self.c)
