"""Measures the server in this process: tokens a second with adapters in one batch, over the base alone.

    OMP_NUM_THREADS=1 python bench/serve.py [part ..] [--write]

Times are the process's CPU seconds; those to the first token are wall clock. Variants take turns within one
process, and figures are medians. The base's requests go to the same server. --write keeps the recorded
figures of parts that are not measured now, so that a run can go on later.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import _measure as m
import torch
from torch import nn

import veneer
from veneer.adapt.banks.entries import entries
from veneer.serve.engine.request import Failed, Finished, Sampling, Tokens
from veneer.serve.server import Server

RESULTS = Path(__file__).parent / "results" / "serve.json"
VOCABULARY = 8192
SIZES = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16)
NEW = 12  # tokens of an answer
MIXED = [("lora", 4), ("lora", 8), ("lora", 16), ("lora", 32), ("dora", 8), ("ia3", None)]
OPTIONS = dict(slots=256, running=64, queue=512, prefix_cache=0, watch=0, engine="packed")
Ask = tuple[list[int], tuple[tuple[str, float], ...]]


def base(dtype: torch.dtype = torch.float32) -> Any:
    """Returns a Llama of width 1024 with random weights and all linear layers that adapters change."""
    m.SIZES["served"] = SIZES
    return m.llama("served", VOCABULARY, dtype).eval()


class Words:
    """A tokenizer of numbers: no text is needed to measure tokens."""

    eos_token_id = bos_token_id = chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(t) for t in text.split()]}

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return "".join(f" {t}" for t in tokens)


def attached(model: nn.Module, name: str, method: str, rank: int | None, seed: int) -> None:
    """Attaches an adapter to all linear layers of the blocks, with random numbers."""
    veneer.attach(model, method, name=name, **({} if rank is None else {"rank": rank}))
    draw = torch.Generator().manual_seed(seed)
    for _, delta in veneer.adapt.attached.changes(model, name):
        for p in delta.parameters():
            noise = 0.02 * torch.randn(p.shape, generator=draw)
            p.data.copy_((1 + noise if method == "ia3" else noise).to(p.dtype))


def serving(model: Any, kinds: Sequence[tuple[str, int | None]], n: int, tokenizer: Any = None) -> Server:
    """Starts a server with n adapters of these kinds in turn, named a0, a1, .."""
    server = veneer.serve(model, tokenizer=tokenizer or Words(), name="base", **OPTIONS)
    for i in range(n):
        attached(model, "own", *kinds[i % len(kinds)], seed=i)
        server.registry.give(f"a{i}", entries(model, {"own": "own"})["own"].forms, f"content {i}")
        veneer.detach(model, "own")
    return server


class Round:
    """Many requests at once, and the times of their tokens."""

    def __init__(self, server: Server, asked: Sequence[Ask], new: int = NEW) -> None:
        self.events: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self.answers: list[list[int]] = [[] for _ in asked]
        sampling = Sampling(max_tokens=new, temperature=0, ignore_eos=True)
        began = time.process_time()
        for i, (prompt, named) in enumerate(asked):
            server.submit(prompt, self._sink(i), sampling, named=named)
        self._wait(len(asked))
        self.seconds = time.process_time() - began

    def _sink(self, i: int) -> Callable[[Any], None]:
        return lambda event: self.events.put((i, event))

    def _wait(self, n: int) -> None:
        while n:
            i, event = self.events.get()
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Tokens):
                self.answers[i] += event.tokens
            n -= isinstance(event, Finished)

    @property
    def generated(self) -> float:
        """Generated tokens a second."""
        return sum(map(len, self.answers)) / self.seconds


def prompts(n: int, tokens: int, seed: int) -> list[list[int]]:
    """Returns prompts of random tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(1, VOCABULARY) for _ in range(tokens)] for _ in range(n)]


def single(n: int, adapters: int) -> list[tuple[tuple[str, float], ...]]:
    """Returns the adapters of n requests, one each."""
    return [((f"a{i % adapters}", 1.0),) for i in range(n)]


Terms = Sequence[tuple[tuple[str, float], ...]]


def rates(
    server: Server, kinds: dict[str, Terms], *, tokens: int = 8, new: int = NEW, turns: int = 3
) -> dict[str, float]:
    """Returns median tokens a second of each kind of batch, in turns: generated, or read if new is 1."""
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(turns + 1):
        for name, terms in kinds.items():
            asked = list(zip(prompts(len(terms), tokens, turn), terms, strict=True))
            done = Round(server, asked, new)
            if turn:
                found[name].append(done.generated if new > 1 else len(terms) * tokens / done.seconds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    print({k: f"{v:.0f} tokens/s" for k, v in medians.items()}, file=sys.stderr, flush=True)
    return medians


def share(rate: dict[str, float], what: str, of: str = "base") -> float:
    return rate[what] / rate[of]


def shares(
    dtype: torch.dtype,
    end: str,
    turns: int = 3,
    model: Any = None,
    tokenizer: Any = None,
    ranks: Sequence[int] = (16, 4),
) -> dict[str, float]:
    """64 requests with 64 adapters of one rank, against 64 of the base."""
    figures = {}
    for rank in ranks:
        with serving(base(dtype) if model is None else model, [("lora", rank)], 64, tokenizer) as server:
            kinds: dict[str, Terms] = {"base": [()] * 64, "own": single(64, 64)}
            rate = rates(server, kinds, turns=turns)
            figures[f"share_of_base_64_r{rank}{end}"] = share(rate, "own")
            if rank == 16:
                figures[f"decode_64_r16_tokens_per_second{end}"] = rate["own"]
                read = rates(server, kinds, tokens=32, new=1, turns=min(2, turns))
                figures[f"prefill_share_64{end}"] = share(read, "own")
    return figures


def grid() -> dict[str, float]:
    """Requests at once x adapters, of mixed ranks and methods; 256 resident adapters; sums of two."""
    figures = {}
    with serving(base(), MIXED, 256) as server:
        for n in (1, 8, 64):
            kinds: dict[str, Terms] = {"base": [()] * n}
            kinds |= {f"{k}": single(n, k) for k in (1, 16, 64, 256) if k <= n or k == 16}
            rate = rates(server, kinds, turns=2)
            figures |= {f"mixed_{n}_requests_{k}_adapters_share": v / rate["base"] for k, v in rate.items()}
            del figures[f"mixed_{n}_requests_base_adapters_share"]
            figures[f"base_{n}_requests_tokens_per_second"] = rate["base"]
        for v in range(16, 256):  # the bank holds them all; requests use the first 16
            server.submit([1], lambda event: None, Sampling(max_tokens=0), named=((f"a{v}", 1.0),))
        resident = rates(server, {"own": single(64, 16)})["own"]
        assert len(server.engine.slots.placed) == 256, len(server.engine.slots.placed)
    with serving(base(), MIXED, 16) as server:
        alone = rates(server, {"own": single(64, 16)})["own"]
    return {**figures, "share_256_vs_16": resident / alone}


def expressions() -> dict[str, float]:
    """64 different sums of two adapters in one batch, over 64 single ones and over the base."""
    draw = random.Random(0)
    sums = [((f"a{i}", draw.uniform(-1, 1)), (f"a{(i + 7) % 64}", draw.uniform(-1, 1))) for i in range(64)]
    with serving(base(), MIXED[:4], 64) as server:
        rate = rates(server, {"base": [()] * 64, "one": single(64, 64), "two": sums})
    return {"expressions_share": share(rate, "two", "one"), "expressions_share_of_base": share(rate, "two")}


def first_token() -> dict[str, float]:
    """Seconds to the first token of 120 requests that arrive at random, at two thirds of the capacity."""
    with serving(base(), MIXED, 64) as server:
        asked = list(zip(prompts(120, 32, 0), single(120, 64), strict=True))
        Round(server, asked[:16])
        began = time.perf_counter()
        Round(server, asked[:16])
        each = (time.perf_counter() - began) / 16
        draw, waits = random.Random(1), SimpleQueue()
        sampling = Sampling(max_tokens=NEW, temperature=0, ignore_eos=True)
        for prompt, named in asked:
            time.sleep(draw.expovariate(1 / (each * 1.5)))
            server.submit(prompt, _first(time.perf_counter(), waits), sampling, named=named)
        found = sorted(waits.get() for _ in asked)
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {f"first_token_{k}_wall": found[min(len(found) - 1, int(q * len(found)))] for k, q in at.items()}


def _first(began: float, waits: SimpleQueue[float]) -> Callable[[Any], None]:
    seen: list[int] = []

    def sink(event: Any) -> None:
        if isinstance(event, Tokens) and not seen:
            seen.append(1)
            waits.put(time.perf_counter() - began)

    return sink


def answers() -> dict[str, float]:
    """Checks 64 answers with single adapters and sums against the model with those attached."""
    model, n = base(), 24
    kinds = [MIXED[i % len(MIXED)] for i in range(n)]
    terms = [*single(n, n), *(((f"a{i % n}", 0.75), (f"a{(i + 5) % n}", -0.3)) for i in range(40))]
    asked = list(zip(prompts(64, 24, 3), terms, strict=True))
    with serving(model, MIXED, n) as server:
        given = Round(server, asked).answers
    for i, kind in enumerate(kinds):
        attached(model, f"a{i}", *kind, seed=i)
    wrong = 0
    for (prompt, named), got in zip(asked, given, strict=True):
        with torch.no_grad(), veneer.using(model, dict(named)):
            logits = model(torch.tensor([[*prompt, *got]])).logits[0, len(prompt) - 1 : -1]
        short = logits.amax(-1) - logits.gather(1, torch.tensor(got)[:, None])[:, 0]
        wrong += bool((short >= 1e-4).any())
    return {"wrong_answers": wrong}


def peers(dtype: torch.dtype, end: str, new: int = 4) -> dict[str, float]:
    """64 requests with 64 adapters of rank 16: PEFT's mixed batch, and one adapter after the other."""
    rows = single(64, 64)
    with serving(base(dtype), [("lora", 16)], 64) as server:
        own = [Round(server, list(zip(prompts(64, 8, t), rows, strict=True)), new) for t in range(3)]
    peft = _peft(base(dtype), 64)
    ids = torch.tensor(prompts(64, 8, 1))
    names = [f"a{i}" for i in range(64)]

    def generate(ids: torch.Tensor, **given: Any) -> float:
        began = time.process_time()
        mask = torch.ones_like(ids)
        more = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0)
        with torch.no_grad():
            peft.generate(input_ids=ids, attention_mask=mask, **more, **given)
        return time.process_time() - began

    generate(ids[:2], adapter_names=names[:2])
    mixed = min(generate(ids, adapter_names=names) for _ in range(2))
    swapped = 0.0
    for i in range(8):  # of 64
        began = time.process_time()
        peft.set_adapter(f"a{i}")
        generate(ids[i : i + 1])
        swapped += 8 * (time.process_time() - began)
    seconds = statistics.median(o.seconds for o in own)
    print(
        f"ours {seconds:.2f} s, PEFT {mixed:.2f} s, one by one {swapped:.2f} s", file=sys.stderr, flush=True
    )
    return {f"vs_peft_64{end}": mixed / seconds, f"vs_swapping_64{end}": swapped / seconds}


def _peft(model: Any, n: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    made = get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=False)
    for i in range(1, n):
        made.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    return made.eval()


def real() -> dict[str, float]:
    """The shares on SmolLM2, from the folder that VENEER_REAL names."""
    from veneer.models import pretrained

    folder = str(Path(os.environ["VENEER_REAL"]) / "smollm2")
    model = pretrained.causal_lm(folder, torch.float32, torch.device("cpu"))
    return shares(torch.float32, "_smollm2", 1, model, pretrained.tokenizer(folder), (16,))


PARTS: dict[str, Callable[[], dict[str, float]]] = {
    "shares": lambda: shares(torch.float32, ""),
    "shares_bf16": lambda: shares(torch.bfloat16, "_bf16"),
    "grid": grid,
    "expressions": expressions,
    "first_token": first_token,
    "answers": answers,
    "peers": lambda: peers(torch.float32, ""),
    "peers_bf16": lambda: peers(torch.bfloat16, "_bf16"),
    "real": real,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = [p for p in PARTS if p != "real" or "VENEER_REAL" in os.environ]
    parser.add_argument("parts", nargs="*", default=usual, help=f"{', '.join(PARTS)}; all unless given")
    parser.add_argument("--write", action="store_true", help="record the figures in bench/results")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    for part in args.parts:
        figures |= {name: float(f"{value:.4g}") for name, value in PARTS[part]().items()}
        if args.write:
            before = json.loads(RESULTS.read_text())["figures"] if RESULTS.exists() else {}
            line = {"bench": "serve", "device": m.device(), "versions": m.versions()}
            RESULTS.write_text(json.dumps({**line, "figures": {**before, **figures}}, indent=1) + "\n")
    line = {"bench": "serve", "device": m.device(), "versions": m.versions(), "figures": figures}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
