"""Adapting what was compressed: learning, forgetting and bytes of LoRA on dense, compressed and quantised
bases.

python bench/compress_adapt.py

The built-in model, dense and compressed by LoRD and by auto; LoRA of rank 8 learns English prose for 40 steps
of 1,024 tokens, on each base in bfloat16 or with its layers in int8, nf4 or spqr. Known text is held-out
library code. Bytes are those of base and adapter, in bfloat16 where not packed. `pair_8` and `pair_4` compare
at equal bytes: auto at keep 0.51 against int8 of the dense model, and its factors in int8 against nf4.
plain80 is auto with two plain factors. Bases and rows stay in runs/bench-compress-adapt and are not made
again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _measure as m
import torch
from compress import calibration, dense, windows

import veneer
from veneer.compress import folder as folders
from veneer.data.pack import Window
from veneer.data.spread import spread
from veneer.embedded import texts
from veneer.models import pretrained
from veneer.ops.draws import keyed
from veneer.tasks.text import next_token
from veneer.tasks.text.bits import bits_per_byte
from veneer.verbs.compress.calibration import batches

KEPT = Path("runs") / "bench-compress-adapt"
BASES: dict[str, tuple[str, float, dict[str, Any]]]
BASES = {"lord80": ("lord", 0.8, {}), "auto80": ("auto", 0.8, {}), "auto51": ("auto", 0.51, {})}
BASES["plain80"] = ("auto", 0.8, {"storage": "plain"})
ROWS = ("dense bf16", "lord80 bf16", "auto80 bf16", "dense int8", "auto51 bf16", "dense nf4", "lord80 nf4")
ROWS += ("auto80 nf4", "auto51 int8", "dense spqr", "plain80 nf4")
STEPS, BATCH, LENGTH, RANK, RATE, TESTED = 40, 8, 128, 8, 5e-3, 24


def base(name: str) -> Any:
    """The base in float32, compressed where that was not done before."""
    if name == "dense":
        return dense()
    if not (KEPT / name).exists():
        model, (method, keep, changed) = dense(), BASES[name]
        veneer.compress(
            model, method, keep=keep, data=calibration(0), folder=KEPT / f"{name}.work", **changed
        )
        veneer.save_compressed(model, KEPT / name)
    return veneer.load_compressed(KEPT / name, dtype=torch.float32)


def learn(model: Any, some: list[dict[str, torch.Tensor]]) -> None:
    """Trains the model's adapter on the batches, one step each, with a cosine to zero."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(learnt, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, len(some))
    model.train()
    for batch in some:
        total, n = next_token.loss(model, batch)
        (total / n).backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        adam.step()
        adam.zero_grad()
        schedule.step()
    model.eval()


def row(name: str, train: list[dict[str, torch.Tensor]], tests: dict[str, list[Window]]) -> dict[str, float]:
    """Bits per byte before and after, and bytes, of one row."""
    path = KEPT / f"{name}.json"
    if path.is_file():
        kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    start, _, format = name.partition(" ")
    torch.manual_seed(0)
    model = base(start).to(torch.bfloat16)
    if format != "bf16":
        veneer.quantise(model, format)
    found = {f"{t}_before": bits_per_byte(model, w, next_token.loss, batch=8) for t, w in tests.items()}
    veneer.attach(model, "lora", rank=RANK, alpha=2 * RANK)
    found["bytes"] = float(sum(t.nbytes for t in folders.weights(model).values()))
    learn(model, train)
    found |= {t: bits_per_byte(model, w, next_token.loss, batch=8) for t, w in tests.items()}
    path.write_text(json.dumps(found), encoding="utf-8")
    print(name, found, flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    KEPT.mkdir(parents=True, exist_ok=True)
    tokenizer = pretrained.tokenizer("builtin")
    learnt = [
        w for w in windows(tokenizer, texts.domain("prose", "train"), LENGTH) if len(w[0].inputs) == LENGTH
    ]
    order = torch.randperm(len(learnt), generator=keyed(0, "prose")).tolist()[: STEPS * BATCH]
    train = batches([learnt[i] for i in order], BATCH, torch.device("cpu"))
    tests = {
        "prose": spread(windows(tokenizer, texts.domain("prose", "test")), TESTED),
        "known": spread(windows(tokenizer, texts.known("test")), TESTED),
    }
    rows = {name: row(name, train, tests) for name in ROWS}
    figures = {f"{name.replace(' ', '_')}_{k}": v for name, found in rows.items() for k, v in found.items()}
    for name in ("lord80", "auto80", "plain80"):
        figures[f"qlora_over_{name}_bytes_over_qlora"] = (
            rows[f"{name} nf4"]["bytes"] / rows["dense nf4"]["bytes"]
        )
    for pair, ours, theirs in (
        ("pair_8", "auto51 bf16", "dense int8"),
        ("pair_4", "auto51 int8", "dense nf4"),
    ):
        figures[f"{pair}_bytes_ratio"] = rows[ours]["bytes"] / rows[theirs]["bytes"]
        figures[f"{pair}_prose_difference"] = rows[ours]["prose"] - rows[theirs]["prose"]
        figures[f"{pair}_known_difference"] = rows[ours]["known"] - rows[theirs]["known"]
    m.report("compress_adapt", figures)


if __name__ == "__main__":
    main()
