"""Trains the built-in model from nothing on the standard library's own source.

    python -m veneer.embedded.pretrain --out runs/pretrain --minutes 90

A Llama of 4.26 M parameters, byte-level BPE of 4096. Resumable: run the same command again. Needs no download.
Muon for the matrices (or AdamW, GaLore or ReLoRA, see via.py), AdamW for embeddings and norms; warm-up, constant rate,
linear decay. A checkpoint is safetensors and JSON, written under a temporary name.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.embedded import pretrain_ways, texts
from veneer.embedded.build import build_model, export, load_checkpoint, save_checkpoint, train_tokenizer


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints, the log and the finished model"
    )
    p.add_argument(
        "--minutes",
        type=float,
        default=90.0,
        help="computing time over all sessions; the rate decays towards it",
    )
    p.add_argument("--tokens", type=float, help="train on this many million tokens instead of for --minutes")
    p.add_argument("--batch", type=int, default=16, help="windows a step")
    p.add_argument("--length", type=int, default=512, help="tokens a window")
    p.add_argument("--muon-lr", type=float, default=0.02)
    p.add_argument("--adam-lr", type=float, default=4e-3)
    p.add_argument(
        "--decay", type=float, default=0.5, help="share of the time in which the rate falls to zero"
    )
    p.add_argument(
        "--library-weight",
        type=float,
        default=2.0,
        help="how often a library token is drawn against a test token",
    )
    p.add_argument("--vocabulary", type=int, default=4096)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--every", type=int, default=250, help="steps between evaluations and checkpoints")
    p.add_argument("--threads", type=int, default=0, help="0: as many as the machine has")
    pretrain_ways.add_arguments(p)
    p.add_argument("--compile", action="store_true", help="compile the model (needs a C++ compiler)")
    return p


def token_stream(tokenizer: Any, documents: list[texts.Document]) -> Tensor:
    """Every document after an end token, as one (n,) int16 stream."""
    end = [tokenizer.eos_token_id]
    ids = [i for d in documents for i in end + tokenizer(d.text, verbose=False)["input_ids"]]
    return torch.tensor(ids + end, dtype=torch.int16)


class Draws:
    """Windows of the two streams; batch `step` depends on the seed and the step alone, so a resumed run goes on exactly."""

    def __init__(self, library: Tensor, tests: Tensor, args: argparse.Namespace) -> None:
        self.streams = [s for s in (library, tests) if len(s) > args.length + 1]
        weights = torch.tensor([args.library_weight * len(library), float(len(tests))])[: len(self.streams)]
        self.weights, self.args = weights, args

    def batch(self, step: int) -> Tensor:
        """(batch, length + 1) int64 tokens."""
        draw = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        which = torch.multinomial(self.weights, self.args.batch, replacement=True, generator=draw)
        rows = []
        for stream in (self.streams[i] for i in which.tolist()):
            start = int(torch.randint(len(stream) - self.args.length - 1, (), generator=draw))
            rows.append(stream[start : start + self.args.length + 1].long())
        return torch.stack(rows)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the next token; windows (b, t + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, stream: Tensor, n_bytes: int, length: int, windows: int | None = None
) -> float:
    """Bits per byte of the stream in disjoint windows; `windows` evenly spaced ones of them for a quick look."""
    model.eval()
    starts = list(range(0, len(stream) - 1, length))
    if windows is not None and windows < len(starts):
        starts = starts[:: len(starts) // windows][:windows]
    nats = tokens = 0.0
    for start in starts:
        row = stream[start : start + length + 1].long()[None]
        nats += float(loss_of(model, row)) * (row.shape[1] - 1)
        tokens += row.shape[1] - 1
    model.train()
    return nats / tokens / math.log(2) * (len(stream) - 1) / n_bytes


def rate(progress: float, decay: float) -> float:
    """Share of the base rate: 1 % warm-up, constant, then linear to zero over the last `decay` of the time."""
    return max(0.0, min(1.0, progress / 0.01 + 0.01, (1 - progress) / decay))


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    library, known = texts.library(), texts.known("valid")
    plain = [d for d in library if not texts.is_test(d.title)]
    tokenizer = train_tokenizer(plain, args.vocabulary)
    streams = [
        token_stream(tokenizer, plain),
        token_stream(tokenizer, [d for d in library if texts.is_test(d.title)]),
    ]
    held, n_bytes = token_stream(tokenizer, known), texts.describe(known)["bytes"]
    model = build_model(tokenizer, args.seed)
    way = pretrain_ways.WAYS[args.via](model, args)
    optimisers = way.optimisers
    meta = load_checkpoint(args.out, model, optimisers)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; tokens: library {len(streams[0]):,}, tests {len(streams[1]):,}",
        flush=True,
    )
    stop: list[int] = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: stop.append(number))
    draws = Draws(streams[0], streams[1], args)
    loss_function = torch.compile(loss_of) if args.compile else loss_of
    log = open(args.out / "log.jsonl", "a", encoding="utf-8")
    mean, facts = 0.0, {}
    while True:
        started = time.monotonic()
        progress = (
            meta["tokens"] / (1e6 * args.tokens) if args.tokens else meta["seconds"] / (60 * args.minutes)
        )
        finished = progress >= 1 or bool(stop)
        if meta["step"] % args.every == 0 or finished:
            bpb = bits_per_byte(model, held, n_bytes, args.length, None if finished else 96)
            facts = {**meta, "loss": mean, "known_valid_bpb": bpb, "rate": rate(progress, args.decay)}
            print(json.dumps(facts), file=log, flush=True)
            print(json.dumps(facts), flush=True)
            if meta["step"]:
                save_checkpoint(args.out, model, optimisers, meta)
        if finished:
            break
        share = way.before(meta["step"])
        for group in (g for o in optimisers for g in o.param_groups):
            group["lr"] = group["initial_lr"] * share * rate(progress, args.decay)
        loss = loss_function(model, draws.batch(meta["step"]))
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        value = loss.item()
        mean = 0.98 * mean + 0.02 * value if mean else value
        meta = {
            "step": meta["step"] + 1,
            "tokens": meta["tokens"] + args.batch * args.length,
            "seconds": meta["seconds"] + time.monotonic() - started,
        }
    way.finish()
    recipe = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    data = {
        "library": texts.describe(plain),
        "tests": texts.describe([d for d in library if texts.is_test(d.title)]),
    }
    export(
        args.out / "model",
        model,
        tokenizer,
        {
            **facts,
            "recipe": recipe,
            "data": data,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
        },
    )
    return 130 if stop else 0


if __name__ == "__main__":
    sys.exit(main())
