"""Measures banks: an adapter for each row against the base and PEFT, FLoRA against LoRA, training of eight.

    OMP_NUM_THREADS=1 python bench/bank.py [decode prefill flora training] [--write]

One linear layer in bfloat16 except in `training`, which is a small Llama. `_overhead` is (with adapters -
base) / base; `_vs_peft` PEFT's time over ours with its adapters in bfloat16 as ours are, `_vs_peft_default`
with adapters in float32, its default; `flora_crossover_*` the highest rank at which FLoRA's products take no
longer than batched LoRA, and `flora_predicted_*` the rank at which the paper's inequality 2 c1 / (d c2) + 1 /
r >= 1 ends (999: never), c1 and c2 being the measured seconds a multiplication of the batched and the dense
product. --write puts the line into bench/results/bank.json; parts that were not run stay as they were.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import _measure as m
import torch
from torch import Tensor, nn

import veneer
from veneer.adapt.attached import changes
from veneer.ops import batched

BF16 = torch.bfloat16
RESULTS = Path(__file__).parent / "results" / "bank.json"


def layer(d: int, dtype: torch.dtype = BF16) -> nn.Sequential:
    """Returns one linear layer d x d."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, d, bias=False)).to(dtype)


def ours(
    d: int, n: int, rank: int, rows: list[int], *, method: str = "lora", dtype: torch.dtype = BF16
) -> nn.Module:
    """Returns the layer with a bank of n adapters, row i with adapter rows[i]."""
    model = layer(d, dtype)
    for i in range(n):
        veneer.attach(model, method, to=["0"], name=f"a{i}", rank=rank, seed=i)
        for _, delta in changes(model, f"a{i}"):
            for p in delta.parameters():
                nn.init.normal_(p, 1.0 if method == "flora" else 0.0, 0.02)
    veneer.bank(model, [f"a{i}" for i in range(n)]).use([f"a{i}" for i in rows])
    return veneer.detach(model, *(f"a{i}" for i in range(n)))


def peft_layer(d: int, n: int, rank: int, *, wide: bool) -> Any:
    """PEFT's layer with n adapters, in float32 if wide, else in bfloat16."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(layer(d), config, adapter_name="a0", autocast_adapter_dtype=wide)
    for i in range(1, n):
        model.add_adapter(f"a{i}", config, autocast_adapter_dtype=wide)
    return model.base_model.model[0]


def served(
    d: int, shape: tuple[int, int], n: int, rank: int, *, peft: bool = False, dtype: torch.dtype = BF16
) -> dict[str, float]:
    """Returns seconds of base, bank and PEFT on x (b, t, d), whose rows use n adapters in mixed order."""
    b, t = shape
    rows = [int(i) for i in torch.randperm(b, generator=torch.Generator().manual_seed(0)) % n]
    x, base, bank = torch.randn(b, t, d, dtype=dtype), layer(d, dtype), ours(d, n, rank, rows, dtype=dtype)
    steps: dict[str, m.Step] = {"base": lambda: base(x), "bank": lambda: bank(x)}
    if peft:
        names = [f"a{i}" for i in rows]
        narrow, default = peft_layer(d, n, rank, wide=False), peft_layer(d, n, rank, wide=True)
        steps |= {
            "peft": lambda: narrow(x, adapter_names=names),
            "peft_default": lambda: default(x, adapter_names=names),
        }
    with torch.no_grad():
        seconds = m.interleaved(steps, repeats=41)
    shown = {k: f"{1e3 * v:.2f} ms" for k, v in seconds.items()}
    print(f"d {d}, {b} x {t} rows, {n} adapters, r {rank}: {shown}", file=sys.stderr, flush=True)
    return seconds


def over(seconds: dict[str, float], what: str = "bank") -> float:
    return seconds[what] / seconds["base"] - 1


def compared(name: str, seconds: dict[str, float]) -> dict[str, float]:
    """Returns the bank's overhead, and PEFT's times over the bank's."""
    peers = {f"{name}_vs_{what}": seconds[what] / seconds["bank"] for what in ("peft", "peft_default")}
    return {f"{name}_overhead": over(seconds), **peers}


def decode() -> dict[str, float]:
    figures = {}
    for rank in (1, 4, 16):
        figures |= compared(f"decode_64_r{rank}", served(2048, (64, 1), 64, rank, peft=True))
    figures["decode_8_r16_overhead"] = over(served(2048, (8, 1), 8, 16))
    return figures


def prefill() -> dict[str, float]:
    """Measures one plain LoRA for all rows, a bound on the cost of products, and the bank in float32."""
    figures = {}
    for d in (512, 2048):
        figures |= compared(f"prefill_d{d}", served(d, (8, 128), 8, 16, peft=True))
        x, base, one = (
            torch.randn(8, 128, d, dtype=BF16),
            layer(d),
            veneer.attach(layer(d), "lora", to=["0"], rank=16),
        )
        with torch.no_grad():
            s = m.interleaved({"base": lambda: base(x), "one": lambda: one(x)}, repeats=41)  # noqa: B023
        figures[f"prefill_d{d}_one_lora_overhead"] = over(s, "one")
        figures[f"prefill_d{d}_fp32_overhead"] = over(served(d, (8, 128), 8, 16, dtype=torch.float32))
    return figures


def products(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """FLoRA of rank r for each row as the paper has it: A (b, r, in), B (b, r, out), x (b, t, in)."""
    scaled = (x[:, None] * A[:, :, None]).flatten(0, 2)  # (b r t, in)
    made = (scaled @ W.mT).view(*A.shape[:2], x.shape[1], -1)
    return (made * B[:, :, None]).sum(1)


def crossover(d: int, b: int, t: int) -> dict[str, float]:
    """Measures the rank up to which FLoRA beats batched LoRA on x (b, t, d); adds the paper's prediction."""
    x, W, ids = (
        torch.randn(b, t, d, dtype=BF16),
        torch.randn(d, d, dtype=BF16) / d**0.5,
        torch.randperm(b) + 1,
    )
    where, gained, end = f"d{d}_{b}x{t}", {}, 0.0
    for r in (1, 2, 4, 8):
        A, B = torch.randn(b + 1, r, d, dtype=BF16), torch.randn(b + 1, r, d, dtype=BF16)
        steps: dict[str, m.Step] = {
            "dense": lambda: x @ W.mT,
            "lora": lambda A=A, B=B: batched.add(x, x @ W.mT, A, B, ids),
            "flora": lambda A=A, B=B: products(x, W, A.index_select(0, ids), B.index_select(0, ids)),
        }
        with torch.no_grad():
            s = m.interleaved(steps, repeats=21)
        gained[r] = s["lora"] / s["flora"]
        c1, c2 = (s["lora"] - s["dense"]) / (2 * d * b * t * r), s["dense"] / (b * t * d * d)
        end = _end(1 - 2 * c1 / (d * c2))  # the last rank's, whose c1 has least of a constant in it
        shown = {k: f"{1e3 * v:.2f} ms" for k, v in s.items()}
        print(
            f"FLoRA {where}, r {r}: {shown}; c1/c2 {c1 / c2:.0f}; paper: wins to r {end:g}",
            file=sys.stderr,
            flush=True,
        )
    wins = len(list(takewhile(lambda gain: gain >= 1, gained.values())))
    figures = {f"flora_r{r}_vs_bmm_{where}": gain for r, gain in gained.items()}
    return {**figures, f"flora_crossover_{where}": [0, *gained][wins], f"flora_predicted_{where}": end}


def _end(gap: float) -> float:
    """Returns the largest r with 1 / r >= gap; 999 if that is any."""
    return min(999.0, 1 / gap) if gap > 0 else 999.0


def flora() -> dict[str, float]:
    figures = {}
    for d in (512, 1024, 2048):
        figures |= crossover(d, 32, 1) | crossover(d, 8, 64)
    rows = list(range(64))
    base, x = layer(2048), torch.randn(64, 1, 2048, dtype=BF16)
    gains, pair = ours(2048, 64, 1, rows, method="flora"), ours(2048, 64, 1, rows)
    with torch.no_grad():
        s = m.interleaved(
            {"base": lambda: base(x), "flora": lambda: gains(x), "lora": lambda: pair(x)}, repeats=41
        )
    return {
        **figures,
        "decode_64_flora_overhead": over(s, "flora"),
        "decode_64_flora_vs_r1": s["lora"] / s["flora"],
    }


def training() -> dict[str, float]:
    """A step of eight adapters on a row of 128 tokens each: in one pass, and one adapter after the other."""
    from veneer.adapt.acting.shared_inputs import discover
    from veneer.tasks.text import next_token

    names = [f"a{i}" for i in range(8)]
    batch = m.shifted(m.random_batch(8, 128, 8192))
    model = m.llama("h512", 8192, BF16)
    for i, name in enumerate(names):
        veneer.attach(model, "lora", rank=m.RANK, name=name, seed=i)
    veneer.train_only(model, *names)

    def learn(rows: dict[str, Tensor]) -> Tensor:
        total, n = next_token.loss(model, rows)
        (total / n).backward()
        model.zero_grad()
        return total

    def apart() -> None:
        for i, name in enumerate(names):
            with veneer.using(model, name):
                learn({k: v[i : i + 1] for k, v in batch.items()})

    with veneer.using(model, "a0"), discover(model):  # as fit does it
        learn({k: v[:1] for k, v in batch.items()})
    veneer.bank(model, names, trainable=True).use(names)

    def together() -> None:
        with veneer.using(model, "bank"):
            learn(batch)

    s = m.interleaved({"apart": apart, "together": together}, repeats=5, warm=1)
    base = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "deltas" not in n)
    # a weight, its gradient, two moments
    own = sum(p.numel() * 16 for n, p in model.named_parameters() if "deltas" in n) / 8
    kept = {
        how: _kept(step)
        for how, step in (
            ("apart", lambda: _one(model, batch, "a0")),
            ("together", lambda: _one(model, batch, "bank")),
        )
    }
    eight = 8 * (base + own + kept["apart"])
    shown = {
        **{k: f"{v:.2f} s" for k, v in s.items()},
        **{f"{k} kept": f"{v / 2**20:.0f} MiB" for k, v in kept.items()},
    }
    print(
        f"eight adapters: {shown}, base {base / 2**20:.0f} MiB, adapter {own / 2**20:.1f} MiB",
        file=sys.stderr,
    )
    return {
        "training_8_adapters_vs_separate": s["apart"] / s["together"],
        "training_8_adapters_memory_vs_separate": (base + 8 * own + kept["together"]) / eight,
        "training_8_adapters_memory_vs_one_after_the_other": (base + 8 * own + kept["together"])
        / (base + own + kept["apart"]),
    }


def _one(model: Any, batch: dict[str, Tensor], name: str) -> Any:
    from veneer.tasks.text import next_token

    rows = batch if name == "bank" else {k: v[:1] for k, v in batch.items()}
    with veneer.using(model, name):
        return next_token.loss(model, rows)


def _kept(step: m.Step) -> int:
    """Returns bytes that a forward pass keeps for the backward, each storage once, without parameters."""
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter) and (t._base is None or not isinstance(t._base, nn.Parameter)):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = step()
    del result
    return sum(found.values())


PARTS = {"decode": decode, "prefill": prefill, "flora": flora, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=[*PARTS], help=f"{', '.join(PARTS)}; all unless given")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    figures = {name: float(f"{value:.4g}") for part in args.parts for name, value in PARTS[part]().items()}
    if args.write:
        before = json.loads(RESULTS.read_text())["figures"] if RESULTS.exists() else {}
        line = {
            "bench": "bank",
            "device": m.device(),
            "versions": m.versions(),
            "figures": {**before, **figures},
        }
        RESULTS.write_text(json.dumps(line, indent=1) + "\n")
    m.report("bank", figures)


if __name__ == "__main__":
    main()
