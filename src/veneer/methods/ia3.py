"""(IA)3: k' = l_k * k, v' = l_v * v, and l_ff * h in the feed-forward layer.  Liu et al. 2022,
https://arxiv.org/abs/2205.05638

Keys, values and the input of the last feed-forward layer are multiplied number by number: a gain g of outputs
on the first two layers, a gain c of inputs on the third.

Parameters: out or in of each of these layers.
State: the gains.
Cost: one multiplication per number; merged: none. As in the paper a layer's bias is multiplied too, so keys
and values of layers with a bias (BERT, GPT-2, Qwen 2) cannot be merged into the weight alone.
Use: thousands of adapters; few examples.
Against: only scales existing features; below LoRA if there is enough data to learn from. Several active
adapters multiply in PEFT; here they add up as changes of W.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import NotMergeable
from veneer.methods.base.delta import Delta, master_dtype
from veneer.methods.base.factors import ROWWISE, Factors
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors
from veneer.methods.base.protocols import GainsInput
from veneer.sites import Site, find
from veneer.sites.finding.names import Target
from veneer.sites.roles import FEEDFORWARD_END, called


@final
class IA3(Delta, GainsInput, PeftStored):
    """l starts at one: (in,) on a feed-forward layer, else (out,)."""

    peft_settings = {"feedforward_modules": None, "fan_in_fan_out": False, "init_ia3_weights": True}

    def __init__(self, site: Site, *, feedforward: str | tuple[str, ...] = FEEDFORWARD_END) -> None:
        """
        feedforward: layers with a gain of inputs instead of outputs: a regular expression, or endings of
        names
        """
        super().__init__()
        self.reads = _named(site.name, feedforward)
        size = site.in_ if self.reads else site.out
        self.l = nn.Parameter(torch.ones(size, dtype=master_dtype(site), device=site.device))

    @classmethod
    def find(
        cls,
        model: nn.Module,
        to: Target | None,
        exclude: Target = (),
        untie: bool = False,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> list[Site]:
        """Returns the sites in `to`, or every known layer of keys or values and every end of a feed-forward
        block."""
        known = ("keys and values", "the end of the feed-forward block")
        chosen = (
            called(model, *known, hint="name all of them with to= and feedforward=") if to is None else to
        )
        return find(model, chosen, exclude, untie)

    def _scales_bias(self, site: Site) -> bool:
        return not self.reads and site.shift() is not None

    def factors(self, site: Site) -> Factors | None:
        return None if self._scales_bias(site) else self._gain(site)

    def _gain(self, site: Site) -> Factors:
        A, B = self.l.new_empty(0, site.in_), self.l.new_empty(site.out, 0)
        return Factors(A, B, c=self.l) if self.reads else Factors(A, B, g=self.l)

    def normal_form(self, site: Site) -> Factors | None:
        return self.factors(site) if site.kind in ROWWISE else None

    def delta(self, site: Site) -> Tensor:
        if self._scales_bias(site):
            raise NotMergeable(
                f"(IA)3 multiplies the bias of {site.name!r} too, so it cannot be merged into the weight;"
                f" keep it as an adapter, or exclude layers with a bias"
            )
        return self._gain(site).dense(site)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if self._scales_bias(site):
            return site.rows((self.l - 1).to(y.dtype)) * y
        return self._gain(site).added(self.dropped(x, y, site), y, site)

    def to_peft(self, site: Site) -> PeftForm | None:
        if site.kind not in ROWWISE:
            return None
        which = self.options["feedforward"]
        expression = which if isinstance(which, str) else f".*({'|'.join(map(re.escape, which))})"
        gain = self.l.detach()
        return PeftForm(
            {"peft_type": "IA3", "feedforward_modules": expression},
            {"ia3_l": gain[None] if self.reads else gain[:, None]},
        )

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "IA3"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        which = config["feedforward_modules"] or ()
        delta = build(cls, site, {"feedforward": which if isinstance(which, str) else tuple(sorted(which))})
        assert isinstance(delta, cls)
        check_peft_tensors(site, tensors, {"ia3_l": (1, site.in_) if delta.reads else (site.out, 1)})
        with torch.no_grad():
            delta.l.copy_(tensors["ia3_l"].flatten())
        return delta


def _named(name: str, which: str | tuple[str, ...] | list[str]) -> bool:
    return re.fullmatch(which, name) is not None if isinstance(which, str) else name.endswith(tuple(which))
