"""Faults: clients that do not read, engines that die, queues that are full, adapters that are broken."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import served, tiny

import veneer
from veneer.serve.http.running import Background

TENSORS = "adapter_model.safetensors"


def until(condition, seconds=20):
    """Waits for a condition, which must come true. Returns the seconds that it took."""
    began = time.monotonic()
    while not condition() and time.monotonic() < began + seconds:
        time.sleep(0.01)
    assert condition()
    return time.monotonic() - began


def request(port, body):
    """Returns a connection that has sent a completion request."""
    connection = socket.create_connection(("127.0.0.1", port))
    text = json.dumps(body)
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    connection.sendall("\r\n".join([*head, f"Content-Length: {len(text)}", "", text]).encode())
    return connection


def test_a_client_that_does_not_read_is_cut_and_delays_nobody(server):
    many = {"prompt": "the cat", "max_tokens": 240, "n": 32, "stream": True, "ignore_eos": True}
    many["logprobs"] = 20  # more bytes than the sockets' buffers hold
    with Background(server, send_seconds=1.0) as web:

        def latencies(n=40):
            found = []
            for _ in range(n):
                began = time.monotonic()
                body = {"model": "french", "prompt": "the cat", "max_tokens": 2}
                assert httpx.post(f"{web.url}/v1/completions", json=body, timeout=60).status_code == 200
                found.append(time.monotonic() - began)
            return sorted(found)

        alone = latencies()
        with request(web.port, many) as slow:
            until(lambda: len(server.engine.known) == 32)
            until(lambda: not server.engine.known, 120)  # answers end, whoever reads them
            beside = latencies()
            assert beside[-1] <= 2 * alone[-1] + 0.5
            slow.settimeout(30)
            time.sleep(1.5)
            read = 0
            with contextlib.suppress(ConnectionResetError):
                while part := slow.recv(1 << 20):
                    read += len(part)
                    assert b"[DONE]" not in part
            assert read > 0


def test_an_engine_that_dies_is_seen_at_once_and_serves_again(folders, oracle):
    options = dict(tokenizer=tiny.tokenizer(), watch=0)
    with veneer.serve(served.model(), folders, **options) as server, Background(server) as web:
        client = openai.OpenAI(base_url=f"{web.url}/v1", api_key="none", max_retries=0)
        client.completions.create(model="french", prompt="the cat", max_tokens=1)
        step = server.engine.runner.step
        calls = []

        def dying(works, *, decoding):
            calls.append(time.monotonic())
            if len(calls) == 5:
                raise SystemExit("killed")
            return step(works, decoding=decoding)

        server.engine.runner.step = dying
        stream = client.completions.create(
            model="french", prompt="the cat", max_tokens=99, stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(openai.APIError, match="the engine stopped"):
            list(stream)
        health = f"{web.url}/health"
        seen = until(lambda: httpx.get(health).status_code == 503 or server.supervisor.restarts > 0, 1.0)
        back = until(lambda: httpx.get(health).status_code == 200, 10.0)
        assert seen <= 1.0 and back <= 10.0 and server.supervisor.restarts == 1
        p = served.prompt(2, 9)
        answer = server.complete(p, "french+formal@0.5", max_tokens=8, temperature=0)
        terms = (("french", 1.0), ("formal", 0.5))
        assert oracle.differs(p, terms, list(answer.tokens)) is None


def test_a_full_queue_is_429_and_the_client_that_waits_is_answered(folders):
    options = dict(tokenizer=tiny.tokenizer(), watch=0, running=1, queue=1)
    with veneer.serve(served.model(), folders, **options) as server, Background(server) as web:
        url = f"{web.url}/v1"
        impatient = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        patient = openai.OpenAI(base_url=url, api_key="none", max_retries=60)  # of a second each
        long = dict(model="french", prompt="the cat", extra_body={"ignore_eos": True}, temperature=0)
        with ThreadPoolExecutor(9) as pool:
            step = server.engine.runner.step

            def slow(works, *, decoding):
                time.sleep(0.05)  # 200 steps take 10 s, long enough for the requests below on a busy machine
                return step(works, decoding=decoding)

            server.engine.runner.step = slow
            busy = [pool.submit(patient.completions.create, max_tokens=200, **long)]
            until(lambda: server.engine.active)
            for _ in range(3):  # one waits in the queue, the others come again: the queue stays full
                busy.append(pool.submit(patient.completions.create, max_tokens=10, **long))
            until(lambda: server.engine.queued == 1)
            until(lambda: httpx.get(f"{web.url}/ready").status_code == 503)
            asked = [pool.submit(impatient.completions.create, max_tokens=1, **long) for _ in range(4)]
            found = [e for f in asked if isinstance(e := f.exception(), openai.RateLimitError)]
            assert found and "wait already" in str(found[0]) and found[0].code == "overloaded"
            assert found[0].response.headers["retry-after"] == "1"
            server.engine.runner.step = step
            busy.append(pool.submit(patient.completions.create, max_tokens=1, **long))
            assert [f.result().usage.completion_tokens for f in busy] == [200, 10, 10, 10, 1]


def without_proof(folder):
    """Removes the manifest, as in a folder that PEFT wrote."""
    (folder / "veneer.json").unlink()
    return load_file(folder / TENSORS)


def nan(folder):
    tensors = without_proof(folder)
    first = next(iter(tensors))
    save_file({**tensors, first: torch.full_like(tensors[first], torch.nan)}, folder / TENSORS)


def wrong_shape(folder):
    tensors = without_proof(folder)
    first = next(k for k in tensors if "lora_A" in k)
    save_file({**tensors, first: torch.ones(tensors[first].shape[0], 7)}, folder / TENSORS)


def other_names(folder):
    tensors = without_proof(folder)
    save_file({k.replace("layers", "blocks"): t for k, t in tensors.items()}, folder / TENSORS)


def pickled(folder):
    tensors = without_proof(folder)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


def flipped(folder):
    content = bytearray((folder / TENSORS).read_bytes())
    content[-5] ^= 4
    (folder / TENSORS).write_bytes(content)


def zeros(folder):
    save_file({k: torch.zeros_like(t) for k, t in without_proof(folder).items()}, folder / TENSORS)


BROKEN = {
    nan: "NaN or infinity",
    wrong_shape: "7",
    other_names: "blocks",
    pickled: "safetensors",
    flipped: "sha256|differ|hash",
    zeros: "no effect|zero",
}


def test_broken_adapters_are_refused_with_the_reason_and_the_others_serve_on(tmp_path, folders, oracle):
    for damage in BROKEN:
        shutil.copytree(folders / "french", tmp_path / damage.__name__)
        damage(tmp_path / damage.__name__)
    shutil.copytree(folders / "formal", tmp_path / "formal")
    p = served.prompt(4, 9)
    options = dict(tokenizer=tiny.tokenizer(), watch=0)
    with veneer.serve(served.model(), tmp_path, **options) as server, Background(server) as web:
        before = server.complete(p, "formal", max_tokens=0, prompt_logprobs=True).prompt_logprobs
        for damage, reason in BROKEN.items():
            body = {"model": damage.__name__, "prompt": "the cat", "max_tokens": 1}
            r = httpx.post(f"{web.url}/v1/completions", json=body, timeout=60)
            error = r.json()["error"]
            assert (r.status_code, error["code"]) == (422, "adapter_invalid"), damage.__name__
            assert httpx.codes.is_client_error(r.status_code) and r.headers["x-should-retry"] == "false"
            assert str(tmp_path) not in r.text
            assert re.search(reason, error["message"]), error["message"]
        after = server.complete(p, "formal", max_tokens=0, prompt_logprobs=True).prompt_logprobs
        assert before[1:] == after[1:]
        cards = httpx.get(f"{web.url}/v1/models").json()["data"]
        assert {c["id"] for c in cards if c.get("veneer", {}).get("error")} == {d.__name__ for d in BROKEN}
        assert str(tmp_path) not in json.dumps(cards)
        assert len(server.engine.slots.placed) == 1


def test_keys_guard_every_described_path(server):
    with Background(server, keys=["one"], loading=True) as web:
        described = httpx.get(f"{web.url}/openapi.json", auth=("", "one")).json()["paths"]
        calls = [(method, path) for path, methods in described.items() for method in methods]
        calls += [("get", "/"), ("get", "/openapi.json"), ("get", "/docs"), ("post", "/v1/embeddings")]
        for method, path in calls:
            for headers in ({}, {"Authorization": "Bearer two"}, {"Authorization": "Basic b25l"}):
                r = httpx.request(method, web.url + path.replace("{name}", "french"), headers=headers)
                assert r.status_code == (200 if path == "/health" else 401), (method, path)
        assert len(calls) >= 17


def test_an_evicted_adapter_that_waits_is_read_again(folders, oracle):
    options = dict(tokenizer=tiny.tokenizer(), slots=1, running=4, adapter_memory=0, watch=0)
    with veneer.serve(served.model(), folders, **options) as server:
        p, done = served.prompt(6, 8), threading.Event()
        names = ["french", "formal", "wide", "french", "formal"]
        with ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(lambda n: server.complete(p, n, max_tokens=6, temperature=0), names))
        done.set()
        for n, a in zip(names, answers, strict=True):
            assert oracle.differs(p, ((n, 1.0),), list(a.tokens)) is None
        assert server.engine.slots.evictions >= 2
