"""A tiny language model on disk, texts for it to learn, and trainings in processes of their own that may
be killed."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import sys
from dataclasses import fields
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from support import models

from veneer.data.reading import Reading

END = "<|end|>"
WORDS = (
    "the cat sat on a mat and looked at the moon while seven dogs ran round an old house in the rain".split()
)
# What may differ between two runs that are the same.
TIMES = ("seconds", "tokens_per_second", "peak_memory_bytes", "report_seconds")


@functools.cache
def tokenizer() -> Any:
    """A byte-level BPE of 320 tokens with an end token that separates documents."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(kinds.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text(0, 400)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def text(seed: int, words: int) -> str:
    """Nonsense of a few words, a sentence a line, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    picked = [WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=draw).tolist()]
    return "\n".join(" ".join(picked[i : i + 8]) + "." for i in range(0, words, 8)) + "\n"


def base(folder: Path, **config: Any) -> Path:
    """A tiny random Llama with its tokenizer, as transformers saves them."""
    model = models.llama(vocab_size=len(tokenizer()), max_position_embeddings=128, **config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def settings(folder: Path, **changed: Any) -> dict[str, Any]:
    """A short training with everything on that draws random numbers or adds up: dropout, accumulation,
    packing."""
    if not (folder / "base").exists():
        base(folder / "base")
        (folder / "train.txt").write_text(text(1, 1200), encoding="utf-8")
        (folder / "valid.txt").write_text(text(2, 120), encoding="utf-8")
        (folder / "known.txt").write_text(text(3, 120), encoding="utf-8")
    own = {
        "model": str(folder / "base"),
        "data": str(folder / "train.txt"),
        "valid": str(folder / "valid.txt"),
        "known": str(folder / "known.txt"),
        "options": {"rank": 4, "dropout": 0.1},
        "lr": 1e-2,
        "steps": 14,  # one epoch is 12
        "batch": 2,
        "accumulate": 2,
        "length": 32,
        "eval_every": 4,
        "save_every": 3,
        "eval_windows": 4,
        "precision": "fp32",
        "device": "cpu",
        "report": False,
        "out": str(folder / "run"),
    }
    return {**own, **changed}


def reading(run: Any) -> dict[str, Any]:
    """Returns the settings of a run that say how texts are read."""
    return {f.name: getattr(run, f.name) for f in fields(Reading)}


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def untimed(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in figures.items() if k not in TIMES}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without what may differ between two runs that are the same."""
    return [
        untimed(json.loads(line))
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@functools.cache
def _forks() -> Any:
    """Processes forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.tiny_child"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        p for p in sys.path if p
    )  # the server looks for its modules there alone
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def train(
    given: dict[str, Any],
    *,
    signal_at: tuple[int, int] | None = None,
    then: int = 0,
    compiling: bool = False,
    die_after: float = 0.0,
) -> int:
    """A training in a process of its own: its exit code, negative for the signal that killed it.

    signal_at: (step, signal), sent as soon as that step is computed; then: a second signal, sent next;
    compiling: the first is sent within that step, as if it were compiled; die_after: seconds of training
    until a deadly alarm.
    """
    from support import tiny_child

    process = _forks().Process(
        target=tiny_child.train, args=(given, signal_at, then, compiling, die_after, torch.get_num_threads())
    )
    process.start()
    process.join(300)
    code = process.exitcode
    if code is None:
        os.kill(process.pid, signal.SIGKILL)
        sys.exit("a training did not end within five minutes")
    return int(code)
