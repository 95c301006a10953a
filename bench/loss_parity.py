"""Compares losses of Veneer and PEFT over 300 steps from one start, in 3 orders of the data.

The figure is the difference of the mean losses on held-out text after training, over the standard deviation
of PEFT's over the orders. PEFT runs with autocast_adapter_dtype=False, its faster setting, which keeps the
adapter itself in bfloat16.

python bench/loss_parity.py [picture.png]
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import _measure as m
import torch

from veneer.data.order.order import Order
from veneer.models import pretrained
from veneer.optim.base.groups import set_rates
from veneer.runs.learner import learner
from veneer.runs.prepare import prepare
from veneer.tasks.text.bits import bits_per_byte
from veneer.train.loop import schedule
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

STEPS, ROWS, LENGTH, RATE, WARMUP, HELD_OUT, ORDERS = 300, 4, 256, 2e-3, 15, 32, (0, 1, 2)
CPU = torch.device("cpu")


def order_of(windows: Any, seed: int) -> Order:
    """Returns the batches of one training."""
    return Order(windows, ROWS, 1, total=STEPS * ROWS, seed=seed)


def rate(step: int) -> float:
    """Returns the learning rate of both."""
    return RATE * schedule.share(step, STEPS, WARMUP, "cosine")


def start() -> tuple[Any, Any]:
    """Returns the built-in model adapted by Veneer, and the same texts for all."""
    shape = dict(batch=ROWS, length=LENGTH, steps=STEPS)
    run = Run(
        data=("builtin:prose",), precision="bf16", lr=RATE, options={"rank": m.RANK}, device="cpu", **shape
    )
    ready = prepare(run, CPU, Voice(False))
    return ready, ready.texts


def held_out(model: Any, objective: Any, found: Any) -> float:
    """Nats a byte of held-out text."""
    return bits_per_byte(model, found["valid"].examples[:HELD_OUT], objective, batch=ROWS) * float(
        torch.log(torch.tensor(2.0))
    )


def ours(seed: int) -> tuple[list[float], float]:
    """Losses of every step, and on held-out text after the last."""
    torch.manual_seed(0)
    ready, found = start()
    order = order_of(found["train"].examples, seed)
    trainer = learner(ready, order, Voice(False))
    losses = [trainer.step(order.step(i), rate(i)).loss for i in range(STEPS)]
    return losses, held_out(ready.model, trainer.objective, found)


def peer(seed: int) -> tuple[list[float], float]:
    """The same of PEFT, whose adapter starts from the same numbers, with the same optimiser and clipping."""
    from peft import LoraConfig, get_peft_model

    from veneer.adapt.attached import changes
    from veneer.tasks.text import next_token

    torch.manual_seed(0)
    ready, found = start()
    begun = {site.name: delta.A.detach().clone() for site, delta in changes(ready.model, "default")}
    base = pretrained.causal_lm("builtin", torch.bfloat16, CPU)
    config = LoraConfig(
        r=m.RANK, lora_alpha=2 * m.RANK, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, A in begun.items():
            model.get_submodule(f"base_model.model.{name}").lora_A.default.weight.copy_(A)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(
        [{"params": trained, "scale": 1.0, "base": 1.0, "share": 0.0}], lr=0.0, weight_decay=0.0
    )
    losses, order = [], order_of(found["train"].examples, seed)
    model.train()
    for i in range(STEPS):
        loss, n = next_token.loss(model, ready.task.collate(order.step(i)[0]), chunked=False)
        (loss / n).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        set_rates(adam, rate(i), 0.0)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()) / n)
    return losses, held_out(model, lambda *given: next_token.loss(*given, chunked=False), found)


def picture(curves: dict[str, list[list[float]]], file: Path) -> None:
    """Training losses, a mean of 10 steps each, of all orders."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (name, every), colour in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
        for k, losses in enumerate(every):
            smooth = [statistics.mean(losses[i : i + 10]) for i in range(0, STEPS, 10)]
            axes.plot(
                range(5, STEPS + 5, 10), smooth, color=colour, alpha=0.7, label=name if k == 0 else None
            )
    axes.set(
        xlabel="step",
        ylabel="training loss, nats a token",
        title="One start, three orders of the data, bfloat16",
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, list[tuple[list[float], float]]] = {"Veneer": [], "PEFT": []}
    for seed in ORDERS:
        for name, act in (("Veneer", ours), ("PEFT", peer)):
            results[name].append(act(seed))
            print(name, seed, f"{results[name][-1][1]:.5f}", file=sys.stderr, flush=True)
    final = {name: [end for _, end in found] for name, found in results.items()}
    if len(sys.argv) > 1:
        picture({name: [losses for losses, _ in found] for name, found in results.items()}, Path(sys.argv[1]))
    gap = statistics.mean(final["Veneer"]) - statistics.mean(final["PEFT"])
    spread = statistics.stdev(final["PEFT"])
    figures = {
        "final_loss_difference_over_seed_sd": abs(gap) / spread,
        "veneer_minus_peft": gap,
        "peft_sd": spread,
    }
    m.report("loss_parity", figures)


if __name__ == "__main__":
    main()
