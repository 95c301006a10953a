"""Faults and load: mixed requests while adapters come, change and go; every answer is right or a clean
error.
"""

from __future__ import annotations

import gc
import json
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from support import served, tiny

import veneer
from veneer.serve.errors import RequestError, UnknownModel
from veneer.serve.http.running import Background

CLIENTS = 16
NAMES = [f"a{i}" for i in range(6)]
VARIANTS = 3  # contents that a name may have


class Load:
    """Clients that ask for random sums, and a hand that loads, replaces and unloads meanwhile."""

    def __init__(self, root: Path, requests: int, seed: int) -> None:
        self.root, self.requests, self.random = root, requests, random.Random(seed)
        for i, name in enumerate(NAMES):
            for v in range(VARIANTS):
                options = {"method": "dora"} if i == 1 else {"method": "ia3"} if i == 2 else {"rank": 2 + i}
                served.save(root, f"{name}-{v}", seed=10 * i + v, **options)
        self.oracle = served.Oracle({f"{n}-{v}": root / f"{n}-{v}" for n in NAMES for v in range(VARIANTS)})
        self.shared = [served.prompt(900 + k, 64) for k in range(3)]
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def prompt(self, draw: random.Random) -> tuple[int, ...]:
        own = served.prompt(draw.randrange(40), draw.randrange(2, 20))
        return draw.choice(self.shared) + own if draw.random() < 0.5 else own

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def ask(self, server, url: str, number: int) -> None:
        draw = random.Random(number)
        over_http = draw.random() < 0.2
        names = draw.sample(NAMES, draw.choice([0, 1, 1] if over_http else [0, 1, 1, 1, 2, 3]))
        terms = [(n, draw.choice([1.0, 1.0, 0.5, -0.75])) for n in names]
        prompt, n = self.prompt(draw), draw.randrange(1, 14)
        model = "+".join(f"{name}@{s}" for name, s in terms)
        leaves = draw.random() < 0.15
        if over_http:
            self.ask_http(url, model, prompt, terms, n, leaves)
            return
        got: list[int] = []
        try:
            for event in server.stream(prompt, model, max_tokens=n, temperature=0):
                got += getattr(event, "tokens", ())
                if leaves and len(got) > n // 2:
                    break
        except UnknownModel:
            self.count("refused")
            return
        except RequestError as e:
            self.problems.append(f"{model}: {e}")
            return
        self.judge(prompt, terms, got, leaves)

    def ask_http(self, url, model, prompt, terms, n, leaves) -> None:
        """Reads a stream to its end, or leaves after the first text."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": n, "temperature": 0, "stream": True}
        text = ""
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as r:
            if r.status_code == 404:
                self.count("refused")
                return
            for line in r.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.problems.append(f"{model}: {event}")
                    return
                text += event["choices"][0]["text"]
                if leaves and text:
                    break
        for own in self.contents(terms):
            with self.lock:
                tokens, near = self.expected(prompt, own, n)
            whole = tiny.tokenizer().decode(tokens, skip_special_tokens=True)
            if near or (whole.startswith(text) if leaves else whole == text):
                self.count("disconnected" if leaves else "over HTTP")
                return
        self.problems.append(f"{terms} over HTTP: {text!r}")

    def expected(self, prompt, own, n) -> tuple[list[int], bool]:
        """Tokens of one-by-one generation up to its end; True if two logits are within 1e-4 on the way."""
        tokens, end = self.oracle.answer(prompt, own, n), tiny.tokenizer().eos_token_id
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        with torch.no_grad(), veneer.using(self.oracle.model, dict(own)):
            logits = self.oracle.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 :]
        first, second = logits.topk(2).values.unbind(-1)
        return tokens, bool((first - second < 1e-4).any())

    def contents(self, terms):
        """Yields the terms with every content that their names may have."""
        for v in range(VARIANTS ** len(terms)):
            yield tuple((f"{n}-{v // VARIANTS**k % VARIANTS}", s) for k, (n, s) in enumerate(terms))

    def judge(self, prompt, terms, got, leaves) -> None:
        """An answer must be that of one content of each of its names, from the first token to the last."""
        found = []
        for own in self.contents(terms):
            with self.lock:
                problem = self.oracle.differs(prompt, own, got) if got else None
            if problem is None:
                self.count("cancelled" if leaves else "in process")
                return
            found.append(problem)
        self.problems.append(f"{terms}: {found}")

    def change(self, server, done: threading.Event) -> int:
        changes = 0
        while not done.is_set():
            name, v = self.random.choice(NAMES), self.random.randrange(VARIANTS)
            if name in server.adapters() and self.random.random() < 0.3:
                server.unload(name)
                time.sleep(0.01)
            server.load(name, self.root / f"{name}-{v}", replace=name in server.adapters())
            changes += 1
        for name in NAMES:
            if name not in server.adapters():
                server.load(name, self.root / f"{name}-0")
        return changes

    def held(self, server) -> list[object]:
        """Returns the adapters in slots that still act for a request, or are held by one."""
        return [v for v in list(server.engine.slots.placed.values()) if not v.is_idle or v.holds]

    def run(self) -> None:
        first = {name: self.root / f"{name}-0" for name in NAMES}
        options = dict(tokenizer=tiny.tokenizer(), slots=4, running=12, step_tokens=48)
        with veneer.serve(served.model(), first, **options) as server, Background(server) as web:
            done = threading.Event()
            with ThreadPoolExecutor(CLIENTS + 1) as pool:
                changing = pool.submit(self.change, server, done)
                list(pool.map(lambda i: self.ask(server, web.url, i), range(self.requests)))
                done.set()
                self.counts["changes"] = changing.result()
            assert server.engine.prefixes.hit > 0 and server.engine.slots.evictions > 0
            deadline = time.monotonic() + 10
            while (server.engine.known or self.held(server)) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not server.engine.known and not self.held(server)
        assert self.problems == []
        print(dict(self.counts), server.engine.prefixes.hit, server.engine.slots.evictions)
        assert self.counts["changes"] > self.requests / 50
        assert self.counts["in process"] + self.counts["over HTTP"] > self.requests / 2
        assert min(self.counts[k] for k in ("over HTTP", "cancelled", "disconnected")) > self.requests / 100


@pytest.mark.parametrize("requests", [200, pytest.param(2000, marks=pytest.mark.slow)], ids=["short", "long"])
def test_mixed_requests_are_right_while_adapters_come_change_and_go(tmp_path, requests):
    Load(tmp_path, requests, seed=requests).run()


@pytest.mark.parametrize("cycles", [60, pytest.param(1000, marks=pytest.mark.slow)], ids=["short", "long"])
def test_loading_and_unloading_again_and_again_keeps_memory(tmp_path, cycles):
    folders = [served.save(tmp_path, f"r{r}", seed=r, rank=r) for r in (4, 16, 24)]
    with veneer.serve(served.model(), tokenizer=tiny.tokenizer(), slots=4) as server:

        def cycle(i):
            server.load("x", folders[i % 3])
            assert server.complete(served.prompt(i, 40), "x", max_tokens=2).tokens is not None
            server.unload("x")

        for i in range(20):
            cycle(i)
        gc.collect()
        before = psutil.Process().memory_info().rss
        for i in range(cycles):
            cycle(i)
        gc.collect()
        deadline = time.monotonic() + 5
        while server.engine.slots.placed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert psutil.Process().memory_info().rss <= 1.05 * before
        assert not server.engine.slots.placed and not server.engine.slots.bank.stacks
        assert server.registry.memory.bytes == 0 and server.adapters() == []


def test_an_adapter_that_is_not_finite_harms_its_own_rows_only(tmp_path, folders, oracle):
    import torch
    from safetensors.torch import load_file, save_file

    bad = served.save(tmp_path, "bad", rank=2)
    file = bad / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    tensors[first] = torch.full_like(tensors[first], torch.nan)
    save_file(tensors, file)
    with pytest.raises(Exception, match="NaN or infinity"):
        veneer.serve(served.model(), {"bad": bad}, tokenizer=tiny.tokenizer())
    (bad / "veneer.json").unlink()
    adapters = {"bad": bad, "french": folders / "french"}
    with veneer.serve(
        served.model(),
        adapters,
        tokenizer=tiny.tokenizer(),
        allow=("finite", "zero", "sha256", "norm", "probe"),
    ) as server:
        prompts = [served.prompt(i, 20 + i) for i in range(6)]
        with ThreadPoolExecutor(12) as pool:
            good = [pool.submit(server.complete, p, "french", max_tokens=12, temperature=0) for p in prompts]
            ill = [pool.submit(server.complete, p, "bad", max_tokens=12) for p in prompts]
            for f in ill:
                with pytest.raises(RequestError, match="not finite") as caught:
                    f.result()
                assert caught.value.status == 422
        for p, f in zip(prompts, good, strict=True):
            assert oracle.differs(p, (("french", 1.0),), list(f.result().tokens)) is None
        again = [server.complete(p, "french", max_tokens=12, temperature=0) for p in prompts]
        for p, a in zip(prompts, again, strict=True):
            assert oracle.differs(p, (("french", 1.0),), list(a.tokens)) is None


def test_no_adapter_starves_beside_one_that_is_asked_all_the_time(folders):
    options = dict(tokenizer=tiny.tokenizer(), slots=1, running=2, patience=0.2, watch=0, queue=1000)
    with veneer.serve(served.model(), folders, **options) as server:
        for name in ("french", "formal"):
            server.complete(served.prompt(1, 4), name, max_tokens=1)
        done = threading.Event()

        def busy(i):
            while not done.is_set():
                server.complete(served.prompt(i, 4), "french", max_tokens=20, temperature=0)

        with ThreadPoolExecutor(4) as pool:
            for i in range(4):
                pool.submit(busy, i)
            time.sleep(0.3)
            began = time.monotonic()
            try:
                for i in range(3):
                    server.complete(served.prompt(i, 4), "formal", max_tokens=2, temperature=0)
                waited = (time.monotonic() - began) / 3
            finally:
                done.set()
        assert waited < 3


def test_many_adapters_over_little_memory_are_read_again_and_never_missing(tmp_path):
    names = [f"m{i}" for i in range(10)]
    for i, name in enumerate(names):
        served.save(tmp_path, name, seed=i, rank=8)
    oracle = served.Oracle({n: tmp_path / n for n in names})
    options = dict(tokenizer=tiny.tokenizer(), slots=2, adapter_memory=0, watch=0)
    with veneer.serve(served.model(), tmp_path, **options) as server:
        p = served.prompt(3, 10)
        with ThreadPoolExecutor(8) as pool:
            for _ in range(2):
                asked = pool.map(lambda n: server.complete(p, n, max_tokens=6, temperature=0), names)
                for n, a in zip(names, asked, strict=True):
                    assert oracle.differs(p, ((n, 1.0),), list(a.tokens)) is None
        assert server.engine.slots.evictions >= 8
        held = [e.version.forms is not None for e in server.registry.entries.values()]
        assert sum(held) <= 3


def test_pinned_adapters_keep_their_places(folders):
    with veneer.serve(served.model(), folders, tokenizer=tiny.tokenizer(), slots=2, watch=0) as server:
        p = served.prompt(3, 6)
        server.complete(p, "french", max_tokens=1)
        server.pin("french")
        for name in ("formal", "dora", "wide", "gains"):
            server.complete(p, name, max_tokens=1)
        assert "french" in [v.name for v in server.engine.slots.placed.values()]
        server.pin("french", False)
        for name in ("formal", "dora"):
            server.complete(p, name, max_tokens=1)
        assert "french" not in [v.name for v in server.engine.slots.placed.values()]
