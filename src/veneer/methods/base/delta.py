"""What every method is: a trainable change of one site, declared as parameters and one formula."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from veneer.methods.base.peft import PeftForm
from veneer.ops.matrix.sketch import Svd
from veneer.sites import Site, find
from veneer.sites.find import Target

ROWWISE = ("linear", "transposed")  # kinds of site that map vectors one by one, the last dimension of x


class Factors(NamedTuple):
    """The normal form  y = g * (W (c * x) + B A (c * x)) + bias.

    A: (r, in); B: (out, r) with all scaling folded in, r = 0 where there are only gains; g: (out,) or None for 1;
    c: (in,) or None for 1.

    An adapter of strength t is W + t (W' - W), and several are the sum of their W' - W, whatever gains they have. Alone
    and at strength 1 a change with c costs one product of x with c in front of the layer; at any other strength, beside
    other changes, and on layers that do not map vectors one by one, its W' - W is made and applied, which is as exact and
    costs another product of the base's size.
    """

    A: Tensor
    B: Tensor
    g: Tensor | None = None
    c: Tensor | None = None

    @property
    def is_product(self) -> bool:
        """Whether W' - W is B A and nothing else."""
        return self.g is None and self.c is None


class Products(NamedTuple):
    """y = g * W x + sum_k b_k * W (a_k * x) + bias: what a bank can serve by products with W of each row's own inputs.

    g: (out,); a: (s, in); b: (s, out).
    """

    g: Tensor
    a: Tensor
    b: Tensor


class Stats(NamedTuple):
    """What is known of a layer before an adapter starts there, of the size of W (out, in).

    gradient: the leading part of the loss's gradient in W, which calibration saw; residual: the leading part of what
    quantisation took from W, and left: the share of W's norm that is in neither; leading: the leading part of W itself.
    """

    gradient: Svd | None = None
    residual: Svd | None = None
    left: float | None = None
    leading: Svd | None = None


class Delta(nn.Module, ABC):
    """A trainable change of one site. A method overrides factors() or delta(), or forward() for what is neither.

    The options of a method are the keyword parameters of its __init__(self, site, *, ..): command line and files are
    made from that signature. A method that can start from calibration takes `stats` by place: (self, site, stats, *, ..).
    `roles` names the parameters that optimisers treat apart: the factor on the input side
    is "A", on the output side "B", a row magnitude "magnitude", what multiplies weights "gain".
    """

    roles: ClassVar[dict[str, str]] = {}
    # What adapter_config.json says of this method alone, with PEFT's defaults; LoRA's family has its table in peft_format.
    peft_settings: ClassVar[dict[str, Any]] = {}
    scaling: float = 1.0  # of the product B A of the factors in these roles
    dropout: float = 0.0
    options: dict[str, Any]

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
        """The places of the model that this method, with these options, changes: those of `to`, or its own choice if that is None."""
        return find(model, "all-linear" if to is None else to, exclude, untie)

    @classmethod
    def open(cls, model: nn.Module) -> None:
        """What the model needs besides, before changes of this method hang on it; nothing for most."""

    @classmethod
    def close(cls, model: nn.Module) -> None:
        """Undoes `open`, after the last change of this method came off."""

    def factors(self, site: Site) -> Factors | None:
        """The change in normal form, differentiable, or None where it has none."""
        return None

    def delta(self, site: Site) -> Tensor:
        """W' - W (out, in), differentiable."""
        f = self.factors(site)
        if f is None:
            raise TypeError(f"{type(self).__name__} states neither factors() nor delta()")
        D = f.B @ f.A
        gain = None if f.g is None else f.g[:, None]
        if f.c is not None:
            gain = f.c if gain is None else gain * f.c
        return D if gain is None else (gain - 1) * site.weight().to(D.dtype) + gain * D

    def normal_form(self, site: Site) -> Factors | None:
        """factors() where forward() is nothing but that, on a layer that maps vectors one by one; else None."""
        if (
            type(self).forward is not Delta.forward
            or (self.training and self.dropout)
            or site.kind not in ROWWISE
        ):
            return None
        return self.factors(site)

    def products(self, site: Site) -> Products | None:
        """The change as products with W, differentiable, where it has no normal form and this one; else None."""
        return None

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """What to add to the layer's own output y, given its input x; several changes of one site sum."""
        if self.training and self.dropout:
            x = site.drop(x, self.dropout)
        x = x.to(y.dtype) if x.is_floating_point() else x
        f = self.factors(site)
        if f is None or f.c is not None:
            return site.apply(x, self.delta(site).to(y.dtype))
        if not f.A.shape[0]:
            change = torch.zeros_like(y)
        elif site.factored:
            change = site.mix(site.apply(x, f.A.to(y.dtype)), f.B.to(y.dtype))
        else:
            change = site.apply(x, (f.B @ f.A).to(y.dtype))
        if f.g is None:
            return change
        shift = site.shift()
        own = y if shift is None else y - shift
        return site.rows((f.g - 1).to(y.dtype)) * own + site.rows(f.g.to(y.dtype)) * change

    def onto(self, x: Tensor, y: Tensor, site: Site, *, writable: bool) -> Tensor:
        """The layer's output y with this change, which acts alone and in full. writable: y may be written into."""
        change: Tensor = self(x, y, site)
        return y + change

    def taken(self) -> Factors | None:
        """B A of the start that is subtracted, so that the layer starts as it was; None where nothing has to be."""
        return None

    def gains_input(self, site: Site) -> bool:
        """Whether this change may want the layer's input multiplied."""
        f = self.factors(site)
        return f is not None and f.c is not None

    def input_gain(self, x: Tensor, site: Site) -> Tensor | None:
        """What to multiply the layer's input x by, shaped to act on it, where the change acts alone and in full."""
        form = self.normal_form(site)
        return None if form is None else form.c

    def to_peft(self, site: Site) -> PeftForm | None:
        """The change as PEFT expresses it exactly on the untouched base, or None where PEFT cannot."""
        return None

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        """Whether an adapter with this adapter_config.json is of this method."""
        return False

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        """The change that PEFT wrote as `tensors` for this site, whose rank and alpha stand in `config`."""
        raise TypeError(f"{cls.__name__} is not read from PEFT's format")


def master_dtype(site: Site) -> torch.dtype:
    """What trained parameters are kept in: float32, or float64 on a float64 base."""
    return torch.promote_types(site.dtype, torch.float32)
