"""`veneer serve` as a user calls it: a file of requests, a server that signals end, and clear errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from support.fresh import SOURCE
from support.models import randomise

import veneer
from veneer.cli.frame import main
from veneer.models import pretrained
from veneer.serve.http.running import bind


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two adapters of the built-in model, and a folder with half of one."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("french", "formal")):
        model = pretrained.causal_lm("builtin", torch.float32, torch.device("cpu"))
        veneer.attach(model, "lora", rank=2, name=name, to=["q_proj", "v_proj"])
        randomise(model, name, seed=seed, size=0.05)
        veneer.save(model, folder / name, name)
    veneer.save(model, folder / "broken", "formal")
    tensors = folder / "broken" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:2000])
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_is_answered_and_answered_again_where_it_failed(root, tmp_path, capsys):
    prompt = {"prompt": "The old man", "max_tokens": 4, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    requests = [
        {"custom_id": "a", "url": "/v1/completions", "body": {"model": "french", **prompt}},
        {"custom_id": "b", "body": {"model": "french@0.5+formal@-1", **chat}},
        {"custom_id": "c", "body": {"model": "frech", **prompt}},
        {"custom_id": "d", "body": {"model": "broken", **prompt}},
        {"custom_id": "e", "body": {**prompt, "max_tokens": "many"}},
        prompt,
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, requests)))
    command = ["serve", "--adapters", str(root), "--batch", str(file)]
    assert main(command) == 3
    assert capsys.readouterr().out.startswith("3 answered, 3 failed, 0 kept")
    found = {line["custom_id"]: line["response"] for line in lines(tmp_path / "requests.jsonl.answers.jsonl")}
    assert {k: r["status_code"] for k, r in found.items()} == dict(a=200, b=200, c=404, d=422, e=400) | {
        "6": 200
    }
    assert "did you mean 'french'" in found["c"]["body"]["error"]["message"]
    assert str(root) not in json.dumps(found)
    assert found["b"]["body"]["choices"][0]["message"]["role"] == "assistant"
    more = json.loads(json.dumps(requests[2]).replace("frech", "french"))
    file.write_text("\n".join(map(json.dumps, [*requests[:2], more])))
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("1 answered, 0 failed, 2 kept")


BAD_LINES = "not json\n" + '{"prompt": "a"}\n{"url": "/v2"}\n'


@pytest.mark.parametrize(
    ("arguments", "content", "code", "message"),
    [
        (["--batch", "FILE"], None, 1, r"requests\.jsonl cannot be read: No such file"),
        (["--batch", "FILE"], BAD_LINES, 1, r"jsonl:1: a line must be a JSON object, got 'not json'\n"),
        (["--batch", "FILE"], BAD_LINES, 1, r"jsonl:3: url must be one of /v1/completions"),
        (["--batch", "FILE"], '{"custom_id": 1}\n{"custom_id": 1}', 1, "custom_id '1' must be used once"),
        (["--batch", "FILE", "--out", "FILE/x"], "", 2, "is a file; choose another folder"),
        (["--out", "x"], None, 2, "out needs --batch"),
        (["--adapters", "nowhere"], None, 2, "--adapters must be a folder, got 'nowhere'"),
        (["--adapters", "x", "--demo"], None, 2, "give one of --adapters, --adapter and --demo"),
        (["--adapter", "nowhere"], None, 2, "adapter nowhere: the folder does not exist"),
        (["--slots", "0"], None, 2, "slots must be at least 1, got 0"),
        (["--key-file", "nowhere"], None, 2, "--key-file nowhere cannot be read"),
        (["nowhere-at-all"], None, 2, "'nowhere-at-all' is neither a folder"),
    ],
)
def test_errors_say_what_to_do(tmp_path, capsys, arguments, content, code, message):
    file = tmp_path / "requests.jsonl"
    if content is not None:
        file.write_text(content)
    assert main(["serve", *(a.replace("FILE", str(file)) for a in arguments)]) == code
    assert re.search(message, capsys.readouterr().err)


def test_a_broken_adapter_or_a_port_in_use_ends_the_command(root, capsys):
    assert main(["serve", "--adapter", f"x={root / 'broken'}", "--port", "0"]) == 1
    assert "adapter_model.safetensors is cut off; restore it from a copy" in capsys.readouterr().err
    taken = bind("127.0.0.1", 0)
    try:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    finally:
        taken.close()
    assert "choose another with --port" in capsys.readouterr().err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_answers_end(root, sent, code):
    command = [sys.executable, "-m", "veneer", "serve", "--adapters", str(root), "--port", "0"]
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    kept = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=kept)
    try:
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, "the server ended before it served"
            found = re.search(r"serving builtin with broken, formal, french at http://localhost:(\d+)", line)
        url, got = f"http://localhost:{found[1]}", []
        body = {"model": "french", "prompt": "The", "max_tokens": 120, "ignore_eos": True}
        broken = httpx.post(f"{url}/v1/completions", json={"model": "broken", "prompt": "a"}, timeout=60)
        assert broken.status_code == 422 and str(root) not in broken.text
        thread = threading.Thread(
            target=lambda: got.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))
        )
        thread.start()
        deadline = time.monotonic() + 30
        running = 'veneer_num_requests_running{model_name="builtin"} 1.0'
        while running not in httpx.get(f"{url}/metrics", timeout=30).text and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(sent)
        thread.join(60)
        assert got[0].json()["usage"]["completion_tokens"] == 120
        assert process.wait(30) == code
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
