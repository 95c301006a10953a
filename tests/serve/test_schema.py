"""Requests made from our own OpenAPI description, well formed and not: each gets an answer it describes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from support import served, tiny

import veneer
from veneer.serve.http.running import Background

pytest.importorskip("schemathesis")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


SHORT, LONG = ("fuzzing", 12), ("coverage,fuzzing", 200)


@pytest.mark.parametrize(
    ("phases", "examples"), [SHORT, pytest.param(*LONG, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_answers_are_as_the_description_says(folders, tmp_path, phases, examples):
    command = [str(Path(sys.executable).parent / "st"), "run", "--checks", CHECKS, "--workers", "1"]
    command += ["--phases", phases, "--max-examples", str(examples), "--seed", "1"]
    options = dict(tokenizer=tiny.tokenizer(), watch=0, slots=3)
    with (
        veneer.serve(served.model(), folders, **options) as server,
        Background(server, loading=True, body_bytes=1 << 20) as web,
    ):
        url = f"{web.url}/openapi.json"
        done = subprocess.run([*command, url], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-6000:]
        made = re.search(r"(\d+) generated", done.stdout)
        assert made and int(made[1]) > 5 * examples
        assert server.supervisor.restarts == 0 and not server.engine.known
        body = {"model": "french", "prompt": "the cat", "max_tokens": 2}
        assert httpx.post(f"{web.url}/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("text", ["\\ud800", "\\udfff\\ud800"])
def test_half_a_character_is_refused_wherever_it_stands(folders, text):
    call = f'{{"function": {{"name": "f", "arguments": {{"a": "{text}"}}}}}}'
    bodies = [
        f'{{"messages": [{{"role": "user", "content": "{text}"}}]}}',
        f'{{"messages": [{{"role": "assistant", "tool_calls": [{call}]}}], "max_tokens": 1}}',
        f'{{"messages": [{{"role": "user", "content": ""}}], "tools": [{{"a": "{text}"}}], "max_tokens": 1}}',
        '{"messages": [{"role": "user", "tool_calls": [{"id": "a"}]}]}',
    ]
    kind = {"Content-Type": "application/json"}
    with (
        veneer.serve(served.model(), folders, tokenizer=tiny.tokenizer(), watch=0) as server,
        Background(server) as web,
    ):
        for body in bodies:
            r = httpx.post(f"{web.url}/v1/chat/completions", content=body, headers=kind)
            assert r.status_code in (200, 400), (body, r.text)
            assert r.status_code == 400 or "tools" in body or "tool_calls" in body
