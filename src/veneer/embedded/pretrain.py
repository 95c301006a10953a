"""Trains the built-in model from scratch on the source of the standard library.

    python -m veneer.embedded.pretrain --out runs/pretrain --minutes 90

A Llama of 4.26 M parameters, byte-level BPE of 4096. Resumable: run the same command again. Needs no
download. Muon for the matrices (or AdamW, GaLore or ReLoRA, see pretrain_ways.py), AdamW for embeddings and
norms; warm-up, constant rate, linear decay. A checkpoint is one safetensors file, replaced atomically.
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
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from veneer.data.tokenizer import Tokenizer
from veneer.embedded import pretrain_ways, texts
from veneer.embedded.build import build_model, export, load_checkpoint, save_checkpoint, train_tokenizer
from veneer.train.speed import graph_key


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints, the log and the finished model"
    )
    p.add_argument(
        "--minutes",
        type=float,
        default=90.0,
        help="compute time over all sessions; the rate decays towards its end",
    )
    p.add_argument("--tokens", type=float, help="million tokens to train on, in place of --minutes")
    p.add_argument("--batch", type=int, default=16, help="windows per step")
    p.add_argument("--length", type=int, default=512, help="tokens per window")
    p.add_argument("--muon-lr", type=float, default=0.02)
    p.add_argument("--adam-lr", type=float, default=4e-3)
    p.add_argument("--decay", type=float, default=0.5, help="share of the time with linear decay to zero")
    p.add_argument(
        "--library-weight", type=float, default=2.0, help="odds of a library token against a test token"
    )
    p.add_argument("--vocabulary", type=int, default=4096)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--every", type=int, default=250, help="steps between evaluations and checkpoints")
    p.add_argument("--threads", type=int, default=0, help="0: all cores of the machine")
    pretrain_ways.add_arguments(p)
    p.add_argument("--compile", action="store_true", help="compile the model (needs a C++ compiler)")
    return p


def token_stream(tokenizer: Tokenizer, documents: list[texts.Document]) -> Tensor:
    """Returns all documents, each after an end token, as one (n,) int16 stream."""
    end = [tokenizer.eos_token_id]
    ids = [i for d in documents for i in end + tokenizer(d.text, verbose=False)["input_ids"]]
    return torch.tensor(ids + end, dtype=torch.int16)


class Draws:
    """Draws windows of the two streams.

    A batch depends on seed and step only, so a resumed run continues exactly.
    """

    def __init__(self, library: Tensor, tests: Tensor, args: argparse.Namespace) -> None:
        self.streams = [s for s in (library, tests) if len(s) > args.length + 1]
        weights = torch.tensor([args.library_weight * len(library), float(len(tests))])[: len(self.streams)]
        self.weights, self.args = weights, args

    def batch(self, step: int) -> Tensor:
        """Returns (batch, length + 1) int64 tokens."""
        draw = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        which = torch.multinomial(self.weights, self.args.batch, replacement=True, generator=draw)
        rows = []
        for stream in (self.streams[i] for i in which.tolist()):
            start = int(torch.randint(len(stream) - self.args.length - 1, (), generator=draw))
            rows.append(stream[start : start + self.args.length + 1].long())
        return torch.stack(rows)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the next token in nats; windows (b, t + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, stream: Tensor, n_bytes: int, length: int, windows: int | None = None
) -> float:
    """Returns bits per byte of the stream over disjoint windows, or over `windows` evenly spaced ones."""
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
    """Returns the share of the base rate: 1 % warm-up, constant, linear to zero over the last `decay`."""
    return max(0.0, min(1.0, progress / 0.01 + 0.01, (1 - progress) / decay))


class Session:
    """One session of a pretraining, from the newest checkpoint in `args.out` on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        library, known = texts.library(), texts.known("valid")
        self.plain = [d for d in library if not texts.is_test(d.title)]
        self.tests = [d for d in library if texts.is_test(d.title)]
        self.tokenizer = train_tokenizer(self.plain, args.vocabulary)
        streams = [token_stream(self.tokenizer, documents) for documents in (self.plain, self.tests)]
        self.draws = Draws(streams[0], streams[1], args)
        self.held, self.n_bytes = token_stream(self.tokenizer, known), texts.describe(known)["bytes"]
        self.model = build_model(self.tokenizer, args.seed)
        self.way = pretrain_ways.WAYS[args.via](self.model, args)
        self.meta = load_checkpoint(args.out, self.model, self.way.optimisers)
        self.mean = 0.0  # running mean of the loss
        parameters, tokens = sum(p.numel() for p in self.model.parameters()), [len(s) for s in streams]
        print(f"{parameters:,} parameters; tokens: library {tokens[0]:,}, tests {tokens[1]:,}", flush=True)

    def train(self, log: TextIO, stop: list[int]) -> dict[str, Any]:
        """Trains until the end or until `stop` is not empty; returns the facts of the last evaluation."""
        args, facts = self.args, dict[str, Any]()
        if args.compile:
            graph_key.use()
        loss_function = torch.compile(loss_of) if args.compile else loss_of
        while True:
            started, meta = time.monotonic(), self.meta
            done = (
                meta["tokens"] / (1e6 * args.tokens) if args.tokens else meta["seconds"] / (60 * args.minutes)
            )
            finished = done >= 1 or bool(stop)
            if meta["step"] % args.every == 0 or finished:
                facts = self._evaluate(done, log, windows=None if finished else 96)
            if finished:
                return facts
            self._step(loss_function, done)
            self.meta = {
                "step": meta["step"] + 1,
                "tokens": meta["tokens"] + args.batch * args.length,
                "seconds": meta["seconds"] + time.monotonic() - started,
            }

    def _evaluate(self, done: float, log: TextIO, windows: int | None) -> dict[str, Any]:
        bpb = bits_per_byte(self.model, self.held, self.n_bytes, self.args.length, windows)
        facts = {**self.meta, "loss": self.mean, "known_valid_bpb": bpb, "rate": rate(done, self.args.decay)}
        print(json.dumps(facts), file=log, flush=True)
        print(json.dumps(facts), flush=True)
        if self.meta["step"]:
            save_checkpoint(self.args.out, self.model, self.way.optimisers, self.meta)
        return facts

    def _step(self, loss_function: Any, done: float) -> None:
        share = self.way.before(self.meta["step"])
        for group in (g for o in self.way.optimisers for g in o.param_groups):
            group["lr"] = group["initial_lr"] * share * rate(done, self.args.decay)
        loss = loss_function(self.model, self.draws.batch(self.meta["step"]))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.way.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        value = loss.item()
        self.mean = 0.98 * self.mean + 0.02 * value if self.mean else value

    def export(self, facts: dict[str, Any]) -> None:
        """Writes the finished model with the facts of its training."""
        self.way.finish()
        recipe = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items() if k != "out"}
        data = {"library": texts.describe(self.plain), "tests": texts.describe(self.tests)}
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        export(
            self.args.out / "model",
            self.model,
            self.tokenizer,
            {**facts, "recipe": recipe, "data": data, **versions},
        )


def main(argv: list[str] | None = None) -> int:
    """Runs a session; returns 130 if a signal stopped it, else 0."""
    args = arguments().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    session = Session(args)
    stop: list[int] = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: stop.append(number))
    with open(args.out / "log.jsonl", "a", encoding="utf-8") as log:
        facts = session.train(log, stop)
    session.export(facts)
    return 130 if stop else 0


if __name__ == "__main__":
    sys.exit(main())
