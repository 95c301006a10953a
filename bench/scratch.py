"""Trains from scratch at equal tokens: all weights, GaLore, ReLoRA, each at its best rate.

    python bench/scratch.py --out runs/scratch

A Llama of width 128 (4 layers, vocabulary 1024, 0.9 M parameters) on the standard library's own source; 200
steps of 8 windows of 64 tokens; bits per byte of held-out modules. Rank 32 (a quarter of the width) and a
period of 50 steps for all; ReLoRA and "lora" (the same without restarts) begin with 50 steps at full rank.
Rates a factor of two apart at seed 0, of the matrices (at full rank, where ReLoRA begins, that of "full") or
of A; embeddings and norms have one rate for all. The chosen rate twice more with other seeds. Resumable; ends
with one JSON line, which --write puts into bench/results/scratch.json.
"""

from __future__ import annotations

import json
import os
import statistics
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _sweep import arguments, conclude
from torch import Tensor, nn

from veneer.embedded import build, pretrain, pretrain_ways, texts

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
STEPS, BATCH, LENGTH, VOCABULARY, FULL_STEPS, PERIOD, SEEDS = 200, 8, 64, 1024, 50, 50, (0, 1, 2)
NEVER = 1 << 30
ADAM_LR = 8e-3  # of embeddings and norms
# Arguments that differ from the script's defaults, the searched rate, and its values.
CONTENDERS: dict[str, tuple[dict[str, Any], str, list[float]]] = {
    "full": ({"via": "full"}, "matrix_lr", [2.5e-4, 5e-4, 1e-3, 2e-3]),
    "galore": ({"via": "galore"}, "matrix_lr", [2e-3, 4e-3, 8e-3, 1.6e-2]),
    "relora": ({"via": "relora"}, "factor_lr", [1e-3, 2e-3, 4e-3, 8e-3]),
    "relora_ratio_4": ({"via": "relora", "ratio": 4.0}, "factor_lr", [5e-4, 1e-3, 2e-3]),
    "relora_ratio_16": ({"via": "relora", "ratio": 16.0}, "factor_lr", [1.25e-4, 2.5e-4, 5e-4, 1e-3]),
    "lora": ({"via": "relora", "period": NEVER}, "factor_lr", [1e-3, 2e-3, 4e-3, 8e-3]),
}


class Data(NamedTuple):
    """The tokenizer, the stream that is learned, and the one that is measured with its length in bytes."""

    tokenizer: Any
    learned: Tensor
    held: Tensor
    n_bytes: int


def read() -> Data:
    """Returns a part of the script's own texts, more than all steps see."""
    plain = [d for d in texts.library() if not texts.is_test(d.title)][::8]
    known = texts.known("valid")[:6]
    tokenizer = build.train_tokenizer(plain, VOCABULARY)
    return Data(
        tokenizer,
        pretrain.token_stream(tokenizer, plain),
        pretrain.token_stream(tokenizer, known),
        texts.describe(known)["bytes"],
    )


def train(data: Data, changed: dict[str, Any], seed: int) -> dict[str, float]:
    """Bits per byte after one training, and the bytes of the optimiser's state at its end."""
    own = [
        "--out",
        "-",
        "--batch",
        str(BATCH),
        "--length",
        str(LENGTH),
        "--rank",
        "32",
        "--period",
        str(PERIOD),
        "--rewarm",
        "5",
    ]
    args = pretrain.arguments().parse_args(
        [*own, "--full-steps", str(FULL_STEPS), "--adam-lr", str(ADAM_LR), "--seed", str(seed)]
    )
    vars(args).update(changed)
    model: nn.Module = build.build_model(data.tokenizer, seed)
    way = pretrain_ways.WAYS[args.via](model, args)
    draws = pretrain.Draws(data.learned, data.learned[:0], args)
    for step in range(STEPS):
        share = way.before(step) * pretrain.rate(step / STEPS, args.decay)
        for group in (g for o in way.optimisers for g in o.param_groups):
            group["lr"] = group["initial_lr"] * share
        pretrain.loss_of(model, draws.batch(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in way.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    state = sum(
        t.numel() * t.element_size() for o in way.optimisers for s in o.state.values() for t in s.values()
    )
    way.finish()
    return {"bpb": pretrain.bits_per_byte(model, data.held, data.n_bytes, LENGTH, 100), "state_bytes": state}


def main() -> None:
    args = arguments(__doc__, "scratch")
    torch.set_num_threads(1)
    build.SIZES.update(SIZES)
    data = read()
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []

    def measured(label: str, rate: float, seed: int) -> dict[str, float]:
        file = args.out / f"{label}-{rate:g}-{seed}.json"
        if not file.exists():
            changed, rated, _ = CONTENDERS[label]
            begun = {"matrix_lr": figures["full_rate"]} if "full_rate" in figures else {}
            file.write_text(json.dumps(train(data, {**begun, **changed, rated: rate}, seed)))
            print(label, rate, seed, file.read_text(), flush=True)
        found: dict[str, float] = json.loads(file.read_text())
        row = {"way": label, "rate": rate, "seed": seed, **found}
        rows.extend([] if row in rows else [row])
        return found

    for label, (_, _, rates) in CONTENDERS.items():
        tried = {rate: measured(label, rate, 0)["bpb"] for rate in rates}
        best = min(tried, key=lambda rate: tried[rate])
        seeds = [measured(label, best, seed) for seed in SEEDS]
        figures[f"{label}_rate"] = best
        figures[f"{label}_bpb"] = statistics.mean(s["bpb"] for s in seeds)
        figures[f"{label}_bpb_sd"] = statistics.stdev(s["bpb"] for s in seeds)
        figures[f"{label}_state_mib"] = seeds[0]["state_bytes"] / 2**20
    conclude("scratch", figures, rows, write=args.write)


if __name__ == "__main__":
    main()
