"""Searches the best ratio of rates of A and B by width of the layer, and tests adaptive rules.

    python bench/width.py --picture docs/width.png

Two tasks for LoRA of rank 4 and 8 on one n x n layer, B = 0 at first, moments by 0.9 and 0.99, 200 steps, 20
of them warm-up of a cosine:

- network: a toy like the paper's. f(x) = w relu((W + s B A) relu(V x)) with x in 5 dimensions learns a fixed
  function from 128 examples; V, W, w are random and frozen. The score is the loss over its start.
- layer: a linear layer learns a change D of rank 16, whose singular values fall from 2 to 0.2, from inputs
  x = M z in batches of 32 with noise 0.02; M is symmetric with singular values from 1.5 down to 0.15. The
  score is |(s B A - D) M|^2 over its start, minus the part that no matrix of rank 8 can reach.

For every rule and width the rate is searched in steps of 2 until both neighbours are worse; scores are means
over the seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _measure as m
import torch
from torch import Tensor, nn

import veneer
from veneer import optim
from veneer.optim.base import groups
from veneer.train.loop import schedule

WIDTHS = (128, 256, 512, 1024, 2048, 4096)
STEPS, WARMUP, SEEDS, S = 200, 20, 2, 2.0
RATIOS = (1, 4, 16, 64)
Rule = tuple[str, dict[str, Any]]
RULES: dict[str, Rule] = {f"ratio {r}": ("loraplus", {"ratio": float(r)}) for r in RATIOS}
RULES |= {name: (name, {}) for name in ("scaled", "balanced", "lora-muon", "lorapro")}


class Network:
    """f(x) = w relu(Z + s B A H), H = relu(V x) (n, 128), Z = W H, against a network of width 32."""

    rank, name = 4, "network"

    def __init__(self, n: int, draw: torch.Generator) -> None:
        x = torch.randn(5, 128, generator=draw)
        self.H = (torch.randn(n, 5, generator=draw) @ x).mul(math.sqrt(2 / 5)).relu()
        self.Z = torch.randn(n, n, generator=draw) @ self.H * math.sqrt(2 / n)
        self.w = torch.randn(n, generator=draw) / math.sqrt(n)
        y = torch.randn(32, generator=draw) @ (torch.randn(32, 5, generator=draw) @ x).relu()
        self.y = (y - y.mean()) / y.std()

    def loss(self, A: Tensor, B: Tensor, draw: torch.Generator) -> Tensor:
        return (self.w @ (self.Z + S * B @ (A @ self.H)).relu() - self.y).square().mean() / 2

    def score(self, A: Tensor, B: Tensor) -> float:
        return float(
            self.loss(A, B, torch.Generator()) / self.loss(A, torch.zeros_like(B), torch.Generator())
        )


class Layer:
    """s B A x against D x, D = left right with left (n, 16), right (16, n)."""

    rank, name = 8, "layer"

    def __init__(self, n: int, draw: torch.Generator) -> None:
        Q = torch.linalg.qr(torch.randn(n, n, generator=draw)).Q
        self.M = (Q * (1.5 * torch.logspace(0, -1, n))) @ Q.T
        self.x = self.M @ torch.randn(n, 2048, generator=draw)
        left, right = (torch.linalg.qr(torch.randn(n, 16, generator=draw)).Q for _ in range(2))
        sizes = 2 * torch.logspace(0, -1, 16)
        self.left, self.right = left * sizes, right.T.contiguous()
        squares = torch.linalg.svdvals(sizes[:, None] * (self.right @ self.M)).square()  # of D M
        self.start, self.rest = float(squares.sum()), float(squares[self.rank :].sum())

    def loss(self, A: Tensor, B: Tensor, draw: torch.Generator) -> Tensor:
        x = self.x[:, torch.randint(self.x.shape[1], (32,), generator=draw)]
        noise = 0.02 * torch.randn(x.shape, generator=draw)
        return (S * B @ (A @ x) - self.left @ (self.right @ x) - noise).square().sum() / (2 * x.shape[1])

    def score(self, A: Tensor, B: Tensor) -> float:
        rows, columns = torch.cat([A, self.right]) @ self.M, torch.cat([S * B, -self.left], 1)
        return (float(((columns.T @ columns) * (rows @ rows.T)).sum()) - self.rest) / self.start


def train(task: Network | Layer, n: int, rule: Rule, rate: float, seed: int) -> float:
    """Returns the score after one training; infinite where it diverges."""
    host = nn.Sequential(nn.utils.skip_init(nn.Linear, n, n, bias=False))  # its weight is never used
    parts = groups.of_adapter(
        veneer.attach(host, to=["0"], rank=task.rank, alpha=S * task.rank, seed=seed), "default"
    )
    A, B = (next(p.parameter for p in parts if p.role == role) for role in "AB")
    optimiser = optim.make(rule[0], **rule[1]).build(optim.Trained(parts, (0.9, 0.99)))
    draw = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        loss = task.loss(A, B, draw)
        if not math.isfinite(float(loss.detach())):
            return math.inf
        optimiser.zero_grad()
        loss.backward()
        groups.set_rates(optimiser, rate * schedule.share(step, STEPS, WARMUP, "cosine"), 0.0)
        optimiser.step()
    with torch.no_grad():
        score = task.score(A, B)
    return score if math.isfinite(score) else math.inf


def best(tasks: list[Any], n: int, rule: Rule, exponent: int) -> tuple[int, float]:
    """Returns the best power of 2 for a rate, searched from `exponent`, and the mean score there."""
    tried: dict[int, float] = {}

    def score(e: int) -> float:
        if e not in tried:
            tried[e] = sum(train(task, n, rule, 2.0**e, seed) for seed, task in enumerate(tasks)) / len(tasks)
        return tried[e]

    while True:
        least = min((exponent - 1, exponent, exponent + 1), key=score)
        if least == exponent:
            return exponent, score(exponent)
        exponent = least


Row = tuple[str, int, str, int, float]


def measure(widths: tuple[int, ...]) -> Iterator[Row]:
    """(task, width, rule, best rate as a power of 2, score there), printed as they come."""
    for kind in (Network, Layer):
        exponents = dict.fromkeys(RULES, -7)
        for n in widths:
            tasks = [kind(n, torch.Generator().manual_seed(seed)) for seed in range(SEEDS)]
            for name, rule in RULES.items():
                exponents[name], score = best(tasks, n, rule, exponents[name])
                print(f"{kind.name} {n:5} {name:10} 2^{exponents[name]:<4} {score:.6f}", flush=True)
                yield kind.name, n, name, exponents[name], score


def picture(rows: list[Row], path: Path) -> None:
    """For each task, the score and the best rate by width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for (scores, rates), kind in zip(grid, (Network, Layer), strict=True):
        for name in RULES:
            own = [(n, e, score) for task, n, rule, e, score in rows if (task, rule) == (kind.name, name)]
            line, label = (
                "--" if name.startswith("ratio") else "-",
                "LoRA (ratio 1)" if name == "ratio 1" else name,
            )
            scores.plot([n for n, *_ in own], [score for *_, score in own], line, marker="o", label=label)
            rates.plot([n for n, *_ in own], [2.0**e for _, e, _ in own], line, marker="o")
        scores.set(ylabel="loss over its start", title=f"{kind.name}: at each rule's own best rate")
        rates.set(ylabel="rate (of A)", title=f"{kind.name}: best rate")
        widths = sorted({n for _, n, *_ in rows})
        for axes in (scores, rates):
            axes.set(xscale="log", yscale="log", xlabel="width")
            axes.set_xticks(widths, [str(n) for n in widths])
            axes.minorticks_off()
    grid[1, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(measure(tuple(args.widths)))
    figures: dict[str, float] = {}
    for task, n, name, e, score in rows:
        figures |= {
            f"{task}_n{n}_{name.replace(' ', '_')}_rate": 2.0**e,
            f"{task}_n{n}_{name.replace(' ', '_')}_score": score,
        }
    for task, n in dict.fromkeys((task, n) for task, n, *_ in rows):
        figures[f"{task}_n{n}_best_ratio"] = min(
            RATIOS, key=lambda r, t=task, n=n: figures[f"{t}_n{n}_ratio_{r}_score"]
        )
    if args.picture:
        picture(rows, args.picture)
    m.report("width", figures)


if __name__ == "__main__":
    main()
