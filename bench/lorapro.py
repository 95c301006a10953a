"""Times LoRA-Pro's correction and steps against AdamW and against the correction layer by layer.

    python bench/lorapro.py

Adapters on all linear layers of Llamas of width 512 (8 layers) and 1024 (12 layers), float32, random factors
and gradients; of both sizes the worse figure counts. The correction is dA, dB with Sylvester's X and no
moments; the layer-by-layer recipe is written after the published algorithm: pseudo-inverses, general complex
eigendecompositions for X, and an (out, out) projector.
"""

from __future__ import annotations

from typing import Any

import _measure as m
import torch
from torch import Tensor

from veneer import optim
from veneer.optim.base import groups
from veneer.optim.base.pairs import Bucket
from veneer.optim.lorapro.forms import Plain

FORMS = ("full", "factored", "sgd")


def adapters(size: str, rank: int, seed: int = 0) -> list[groups.Part]:
    """LoRA on a Llama of this size, with B as after some training, and a gradient for every factor."""
    import veneer

    model = veneer.attach(m.llama(size, 64, torch.float32), "lora", rank=rank, alpha=2 * rank)
    parts = groups.of_adapter(model, "default")
    draw = torch.Generator().manual_seed(seed)
    for part in parts:
        p = part.parameter
        if part.role == "B":
            p.data.copy_(0.01 * torch.randn(p.shape, generator=draw))
        p.grad = 1e-3 * torch.randn(p.shape, generator=draw)
    return parts


def naive(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Returns one layer's correction as the paper states it, with general solvers."""
    SA, SB = A @ A.T, B.T @ B
    iA, iB = torch.linalg.pinv(SA), torch.linalg.pinv(SB)
    P = iB @ gA / s**2
    wb, U = torch.linalg.eig(SB)
    wa, V = torch.linalg.eig(SA)
    C = torch.linalg.solve(U, (-P @ A.T).to(U.dtype)) @ V
    X = (U @ (C / (wb[:, None] + wa[None, :])) @ torch.linalg.inv(V)).real
    rest = torch.eye(len(B), dtype=B.dtype) - B @ iB @ B.T
    return P + X @ A, rest @ gB @ iA / s**2 - B @ X


@torch.no_grad()
def one_by_one(optimiser: Plain) -> list[tuple[Tensor, Tensor]]:
    return [
        naive(*four, float(s)) for b in optimiser.buckets() for *four, s in zip(*_each(b), b.s, strict=True)
    ]


def _each(b: Bucket) -> tuple[list[Tensor], ...]:
    return b.every_A, b.every_B, b.every_gA, b.every_gB


@torch.no_grad()
def correction(optimiser: Plain) -> list[Any]:
    """Returns all layers' corrections, from the parameters and gradients as they lie."""
    return [optimiser.steps(b) for b in optimiser.buckets()]


@torch.no_grad()
def exact_error(optimiser: Plain) -> float:
    """Returns the largest relative error of the undamped float32 correction against float64."""
    worst, optimiser.damping = 0.0, 0.0
    for b in optimiser.buckets():
        found = [[*side] for side in optimiser.steps(b)]
        for i in range(0, len(b.where), 8):
            expected = naive(*(t[i].double() for t in _each(b)), float(b.s[i]))
            worst = max(
                worst, *(float((f[i] - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))
            )
    return worst


def size_figures(size: str) -> dict[str, float]:
    figures: dict[str, float] = {}
    for rank in (16, 64):
        parts = adapters(size, rank)
        trained = optim.Trained(parts)
        plain = optim.make("lorapro", form="sgd").build(trained)
        assert isinstance(plain, Plain)
        rules: dict[str, Any] = {form: optim.make("lorapro", form=form) for form in FORMS}
        rules |= {name: optim.make(name) for name in ("scaled", "balanced", "lora-muon")}
        adamw = torch.optim.AdamW([p.parameter for p in parts], lr=1e-6).step
        pure: dict[str, m.Step] = {"adamw": adamw, "correction": lambda plain=plain: correction(plain)}
        times = m.interleaved(pure, repeats=15, warm=3)
        figures[f"correction_r{rank}_vs_default_adamw"] = times["correction"] / times["adamw"]
        if rank == 16:
            each = m.interleaved(
                {"ours": pure["correction"], "naive": lambda plain=plain: one_by_one(plain)},
                repeats=5,
                warm=1,
            )
            figures["naive_over_ours"] = each["naive"] / each["ours"]
            figures["exact_error"] = exact_error(plain)
        steps: dict[str, m.Step] = {"adamw": adamw}
        for name, rule in rules.items():
            made = rule.build(trained)
            groups.set_rates(made, 1e-6, 0.0)
            steps[name] = made.step
            figures[f"{name}_r{rank}_state_mib"] = rule.state_bytes(trained) / 2**20
        times = m.interleaved(steps, repeats=3, warm=1)
        figures[f"adamw_r{rank}_state_mib"] = optim.make("adamw").state_bytes(trained) / 2**20
        figures |= {f"{name}_r{rank}_step_vs_default_adamw": times[name] / times["adamw"] for name in rules}
    return figures


def main() -> None:
    torch.set_num_threads(1)
    every = {size: size_figures(size) for size in m.SIZES}
    worse = {
        name: (min if name == "naive_over_ours" else max)(f[name] for f in every.values())
        for name in every["h512"]
    }
    m.report("lorapro", worse)


if __name__ == "__main__":
    main()
