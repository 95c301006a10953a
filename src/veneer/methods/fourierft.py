"""FourierFT: W' = W + scaling Re(ifft2(F)), F zero but for n trained coefficients.  Gao et al. 2024, https://arxiv.org/abs/2405.03003

The frequencies are drawn once, as PEFT draws them, the same for all layers of one shape. scaling counts with
1 / (out in), as in PEFT, so that a fixed one means less on wider layers; here it follows the shape, such that
coefficients of norm 1 change W by a root mean square of `rms`, and a learning rate carries over from one width to another.
With `grid` the frequencies are all pairs of a few rows and columns, and the change a product of frozen waves with a small
trained core between them: a LoRA of frozen A. The grid is not in the paper.

Parameters: n a layer.
State: the coefficients, and the frequencies: they are not drawn again.
Cost: fast transforms of the layer's inputs and outputs, forward and backward, or, where W is small beside them, of the
coefficients; no matrix of the size of W is kept. The grid costs as much as a LoRA of twice its columns. Merged: none.
Use: very small files; the grid where speed matters.
Against: in PEFT's comparison on MetaMathQA it learned next to nothing at its defaults; a change of n random frequencies has
no structure that text would prefer, and many more steps or a larger rate are needed than for LoRA.
"""

from __future__ import annotations

import functools
import math
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, ShapeError
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
        frequencies: n, trained coefficients of a layer; on a grid at most so many
        grid: use all pairs of a few row and column frequencies
        rms: root mean square of the change by coefficients of norm 1; the paper's scaling of 150 at a width of 768
        scaling: a fixed scaling instead, as in the paper and PEFT
        seed: draws the frequencies
        """
        super().__init__()
        if frequencies < 1 or frequencies > site.out * site.in_:
            raise ShapeError(
                f"frequencies {frequencies} are not in 1 to out * in = {site.out * site.in_} at {site.name!r}; use fewer"
            )
        if not all(0 < s < math.inf for s in (rms, 1.0 if scaling is None else scaling)):
            raise ConfigError(f"rms and scaling must be numbers above 0, not {rms} and {scaling}")
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
        """What follows from the frequencies, which a file may have replaced."""
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
        W = _frozen(site, x, y) if writable else None
        return fourier.added(
            y, x.to(y.dtype), self._coefficients(), self.rows, self.columns, writable=writable, frozen=W
        )

    def normal_form(self, site: Site) -> Factors | None:
        return self.factors(site) if site.kind in ROWWISE else None

    def to_peft(self, site: Site) -> PeftForm | None:
        """PEFT draws the frequencies again from a seed; they are in the file all the same, for those who read it here.

        One scaling stands for all layers: what is ours beside it goes into the coefficients.
        """
        if self.grid or site.kind not in ROWWISE:
            return None
        drawn = torch.stack(_scattered(site.out, site.in_, len(self.c), self.seed)).to(self.rows.device)
        if not torch.equal(drawn, torch.stack([self.rows, self.columns])):
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


def _frozen(site: Site, x: Tensor, y: Tensor) -> Tensor | None:
    """W where y, which nobody has changed, is x W' and perhaps a bias, of which only x takes a gradient; else None."""
    layer = site.module
    trained = any(p.requires_grad for p in layer.parameters(recurse=False))
    return (
        layer.weight
        if type(layer) is nn.Linear and not trained and x.dtype == layer.weight.dtype == y.dtype
        else None
    )


@functools.lru_cache(maxsize=32)
def _scattered(out: int, in_: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n different places of an (out, in) spectrum, the same for all layers of that shape; PEFT's draw of them."""
    places = torch.randperm(out * in_, generator=torch.Generator().manual_seed(seed))[:n].clone()
    return places // in_, places % in_


def _crossed(out: int, in_: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """p row and q column frequencies with p q <= n, near a square; columns of the lower half, as the others repeat them."""
    draw, q = keyed(seed, f"{out} {in_}"), min(math.isqrt(n), in_ // 2 + 1)
    columns = torch.randperm(in_ // 2 + 1, generator=draw)[:q]
    return torch.randperm(out, generator=draw)[: n // q], columns
