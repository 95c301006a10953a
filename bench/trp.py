"""Trained rank pruning on scikit-learn's digits: parameters left, and accuracy against the same training
without it.

python bench/trp.py

1,797 images of 8 x 8 pixels, a fixed third held out; a network of four convolutions with batch norms and a
linear head, trained by SGD with momentum for the same epochs with and without TRP; five seeds of start and
order. The final network has pairs of layers and is not trained after factoring. The share counts parameters
of all layers.
"""

from __future__ import annotations

import statistics

import _measure as m
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import veneer

SEEDS, EPOCHS, BATCH, RATE, DECAY = 5, 30, 32, 0.05, 1e-4
BUDGET, EVERY, NUCLEAR = 0.45, 10, 3e-4


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, 1, 8, 8) and labels, split by a fixed draw."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images / 16.0, dtype=torch.float32)[:, None]
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[len(x) // 3 :], order[: len(x) // 3]
    return x[train], y[train], x[test], y[test]


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    body = [*block(1, 32, 1), *block(32, 64, 1), *block(64, 64, 2), *block(64, 128, 2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def train(model: nn.Module, x: Tensor, y: Tensor, seed: int, form: str | None) -> nn.Module:
    """Trains the network, with TRP in this form or without, and returns it; factored if with."""
    draw = torch.Generator().manual_seed(seed)
    sgd = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    trp = (
        None
        if form is None
        else veneer.TRP(model, sgd, budget=BUDGET, form=form, every=EVERY, nuclear=NUCLEAR)
    )
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=draw)
        for at in range(0, len(x) - BATCH + 1, BATCH):
            some = order[at : at + BATCH]
            shift = torch.randint(-1, 2, (2,), generator=draw).tolist()
            loss = F.cross_entropy(model(torch.roll(x[some], shift, (2, 3))), y[some])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            schedule.step()
            if trp is not None:
                trp.step()
    return (trp.finish() if trp is not None else model).eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).double().mean())


def main() -> None:
    torch.set_num_threads(1)
    x, y, xt, yt = digits()
    found: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        plain = train(net(seed), x, y, seed, None)
        n = sum(p.numel() for p in plain.parameters())
        found.setdefault("plain", []).append(accuracy(plain, xt, yt))
        for form in ("channel", "spatial"):
            model = train(net(seed), x, y, seed, form)
            found.setdefault(f"{form} accuracy", []).append(accuracy(model, xt, yt))
            found.setdefault(f"{form} share", []).append(sum(p.numel() for p in model.parameters()) / n)
    figures = {"plain_accuracy": statistics.mean(found["plain"])}
    for form in ("channel", "spatial"):
        prefix = "trp" if form == "channel" else "trp_spatial"
        figures[f"{prefix}_parameter_share"] = statistics.mean(found[f"{form} share"])
        lost = [a - b for a, b in zip(found["plain"], found[f"{form} accuracy"], strict=True)]
        figures[f"{prefix}_accuracy_loss_points"] = 100 * statistics.mean(lost)
        figures[f"{prefix}_accuracy_loss_points_sd"] = 100 * statistics.stdev(lost)
    m.report("trp", figures)


if __name__ == "__main__":
    main()
