"""FourierFT: W' = W + scaling Re(ifft2(F)), F zero but for n trained coefficients.  Gao et al. 2024,
https://arxiv.org/abs/2405.03003

The frequencies are drawn once, by PEFT's rule, the same for all layers of one shape. As in PEFT, scaling is
multiplied by 1 / (out in), so a fixed scaling means less on wider layers. By default the scaling follows the
shape: coefficients of norm 1 change W by a root mean square of `rms`, and a learning rate carries over from
one width to another. With `grid` the frequencies are all pairs of a few rows and columns. The change is then
a trained core between frozen waves, a LoRA with frozen A. The grid is not in the paper.

Parameters: n a layer.
State: the coefficients and the frequencies, which are not drawn again.
Cost: fast transforms of the layer's inputs and outputs, forward and backward; if W is smaller than these, of
the coefficients. No matrix of W's size is kept. The grid costs a LoRA of twice its columns; merged: none.
Use: very small files; the grid if speed matters.
Against: learned next to nothing at its defaults in PEFT's comparison on MetaMathQA. Random frequencies have
no structure in common with text: it needs many more steps or a larger rate than LoRA.
"""

from __future__ import annotations

import functools
import math
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import ShapeError
from veneer.methods.base.checks import check_above_zero
from veneer.methods.base.delta import Delta, DenseDelta, master_dtype
from veneer.methods.base.factors import ROWWISE, Factors
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors
from veneer.methods.base.protocols import AddsInPlace, Served
from veneer.ops import fourier
from veneer.ops.draws import keyed
from veneer.sites import Site

PEFT_SCALING = 150.0


@final
class FourierFT(DenseDelta, Served, AddsInPlace, PeftStored):
    """c (n,), or (p, q) on a grid, starts at zero; rows and columns hold the frequencies."""

    peft_settings = {
        "n_frequency": 1000,
        "scaling": PEFT_SCALING,
        "random_loc_seed": 777,
        "n_frequency_pattern": {},
        "init_weights": False,
        "fan_in_fan_out": False,
        "bias": "none",
    }
    rows: Tensor
    columns: Tensor
    A: Tensor
    out_waves: Tensor

    def __init__(
        self,
        site: Site,
        *,
        frequencies: int = 1000,
        grid: bool = False,
        rms: float = 1.8e-4,
        scaling: float | None = None,
        seed: int = 0,
    ) -> None:
        """
        frequencies: n, the number of trained coefficients of a layer; on a grid an upper bound
        grid: use all pairs of a few row and column frequencies
        rms: root mean square of the change for coefficients of norm 1; the default is the paper's at width
        768
        scaling: a fixed scaling in place of rms, as in the paper and PEFT (150 there)
        seed: key of the frequencies
        """
        super().__init__()
        if frequencies < 1 or frequencies > site.out * site.in_:
            raise ShapeError(
                f"frequencies must be from 1 to out * in = {site.out * site.in_} at {site.name!r},"
                f" got {frequencies}; use fewer"
            )
        check_above_zero(rms=rms, scaling=scaling)
        self.grid, self.seed = grid, seed
        self.scaling = scaling if scaling is not None else rms * math.sqrt(2) * site.out * site.in_
        device = site.device
        draw = _crossed if grid else _scattered
        rows, columns = (t.clone().to(device) for t in draw(site.out, site.in_, frequencies, seed))
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        shape = (len(rows), len(columns)) if grid else (frequencies,)
        self.c = nn.Parameter(torch.zeros(shape, dtype=master_dtype(site), device=device))
        self.size = (site.out, site.in_)
        self._follow()

    def _follow(self) -> None:
        """Sets the waves that follow from the frequencies; a loaded file may have replaced these."""
        if self.grid:
            out, in_ = self.size
            self.register_buffer(
                "A", torch.cat(fourier.waves(self.columns, in_, self.c.dtype)), persistent=False
            )  # (2q, in)
            cos, sin = fourier.waves(self.rows, out, self.c.dtype)
            self.register_buffer("out_waves", torch.stack([cos.mT, -sin.mT]), persistent=False)  # (2, out, p)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._follow()

    def _coefficients(self) -> Tensor:
        out, in_ = self.size
        return self.c * (self.scaling / (out * in_))

    def factors(self, site: Site) -> Factors | None:
        return self._waves() if self.grid else None

    def _waves(self) -> Factors:
        return Factors(self.A, torch.cat(list(self.out_waves @ self._coefficients()), 1))

    def delta(self, site: Site) -> Tensor:
        if self.grid:
            return self._waves().dense(site)
        return fourier.dense(self._coefficients(), self.rows, self.columns, *self.size)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if self.grid:
            return self._waves().added(self.dropped(x, y, site), y, site)
        if site.kind not in ROWWISE:
            return super().forward(x, y, site)
        return fourier.added(
            torch.zeros_like(y), x.to(y.dtype), self._coefficients(), self.rows, self.columns, writable=True
        )

    def onto(self, x: Tensor, y: Tensor, site: Site, *, writable: bool) -> Tensor:
        if self.grid or site.kind not in ROWWISE:
            return y + self(x, y, site)  # type: ignore[no-any-return]
        W = _frozen(site) if writable else None
        return fourier.added(
            y, x.to(y.dtype), self._coefficients(), self.rows, self.columns, writable=writable, frozen=W
        )

    def normal_form(self, site: Site) -> Factors | None:
        return self.factors(site) if site.kind in ROWWISE else None

    def to_peft(self, site: Site) -> PeftForm | None:
        """Returns PEFT's form. PEFT draws the frequencies again from a seed; the file holds them for Veneer's
        reader.

        PEFT has one scaling for all layers: the ratio to this layer's goes into the coefficients.
        """
        if self.grid or site.kind not in ROWWISE:
            return None
        drawn = torch.stack(_scattered(site.out, site.in_, len(self.c), self.seed)).to(self.rows.device)
        if (drawn != torch.stack([self.rows, self.columns])).any():
            return None
        given = self.options["scaling"]
        config = {"peft_type": "FOURIERFT", "n_frequency": len(self.c), "random_loc_seed": self.seed}
        if given is not None:
            return PeftForm({**config, "scaling": given}, self._peft_tensors(1.0))
        tensors = self._peft_tensors(self.scaling / PEFT_SCALING)
        return PeftForm({**config, "scaling": PEFT_SCALING, "own_scaling": self.scaling}, tensors)

    def _peft_tensors(self, times: float) -> dict[str, Tensor]:
        return {
            "fourierft_spectrum": self.c.detach() * times,
            "fourierft_indices": torch.stack([self.rows, self.columns]),
        }

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "FOURIERFT"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        n, scaling = config["n_frequency"], config.get("own_scaling", config["scaling"])
        seed = config["random_loc_seed"] if config["random_loc_seed"] is not None else 777
        delta = build(cls, site, {"frequencies": n, "scaling": float(scaling), "seed": seed})
        check_peft_tensors(site, tensors, {"fourierft_spectrum": (n,)})
        with torch.no_grad():
            delta.get_parameter("c").copy_(tensors["fourierft_spectrum"] * (config["scaling"] / scaling))
            if "fourierft_indices" in tensors:
                for name, found in zip(("rows", "columns"), tensors["fourierft_indices"], strict=True):
                    delta.get_buffer(name).copy_(found)
        return delta


def _frozen(site: Site) -> Tensor | None:
    """Returns W if only x takes a gradient through the layer; else None."""
    layer = site.module
    trained = any(p.requires_grad for p in layer.parameters(recurse=False))
    return layer.weight if type(layer) is nn.Linear and not trained else None


@functools.lru_cache(maxsize=32)
def _scattered(out: int, in_: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns n different places of an (out, in) spectrum by PEFT's draw, the same for all layers of that
    shape."""
    places = torch.randperm(out * in_, generator=torch.Generator().manual_seed(seed))[:n].clone()
    return places // in_, places % in_


def _crossed(out: int, in_: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns p row and q column frequencies with p q <= n, near a square. The upper half of columns repeats
    the lower."""
    draw, q = keyed(seed, f"{out} {in_}"), min(math.isqrt(n), in_ // 2 + 1)
    columns = torch.randperm(in_ // 2 + 1, generator=draw)[:q]
    return torch.randperm(out, generator=draw)[: n // q], columns
