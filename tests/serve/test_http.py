"""The server over HTTP, asked by the official openai client: shapes, streams, errors, guards."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import httpx
import openai
import pytest
from support import served, tiny

import veneer
from veneer.errors import ConfigError
from veneer.serve.http.guard import Allowance, Keys
from veneer.serve.http.running import Background, bind

SUM = [{"id": "french", "scale": 0.75}, {"name": "formal", "scale": -0.3}]
PROMPT = list(served.prompt(3, 12))


@pytest.fixture(scope="module")
def web(server):
    with Background(server, body_bytes=1 << 20) as made:
        yield made


@pytest.fixture(scope="module")
def client(web):
    return openai.OpenAI(base_url=f"{web.url}/v1", api_key="none", max_retries=0)


def test_models_are_the_base_and_its_adapters_without_paths(client, folders):
    cards = list(client.models.list())
    assert [c.id for c in cards] == ["tiny", *sorted(served.ADAPTERS)]
    assert [c.parent for c in cards] == [None, *["tiny"] * len(served.ADAPTERS)]
    assert str(folders) not in "".join(c.model_dump_json() for c in cards)
    assert client.models.retrieve("french").root == "french"


@pytest.mark.parametrize(
    ("given", "terms"),
    [
        (dict(model="tiny"), ()),
        (dict(model="french@0.75+formal@-0.3"), (("french", 0.75), ("formal", -0.3))),
        (dict(model="tiny", extra_body={"lora": SUM}), (("french", 0.75), ("formal", -0.3))),
        (dict(model="", extra_body={"adapter_id": "dora"}), (("dora", 1.0),)),
        (dict(model="tiny", extra_body={"lora": [{"id": 0, "scale": 0.5}]}), (("dora", 0.5),)),
    ],
)
def test_every_way_to_name_adapters_gives_their_answer(client, oracle, given, terms):
    got = client.completions.create(prompt=PROMPT, max_tokens=8, temperature=0, logprobs=0, **given)
    expected = tiny.tokenizer().decode(oracle.answer(tuple(PROMPT), terms, 8), skip_special_tokens=True)
    text = got.choices[0].text
    assert text and expected.startswith(text.rstrip("�"))
    assert got.veneer == {"adapters": [{"name": n, "scale": s} for n, s in terms]}
    assert got.usage.prompt_tokens == len(PROMPT) and got.usage.completion_tokens <= 8


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_is_the_whole_answer_in_parts(client, chat):
    given = dict(model="wide", max_tokens=12, temperature=0, extra_body={"ignore_eos": True})
    if chat:
        make = client.chat.completions.create
        given["messages"] = [{"role": "user", "content": "the cat sat on"}]
    else:
        make, given["prompt"] = client.completions.create, "the cat sat on"
    whole = make(**given)
    chunks = list(make(stream=True, stream_options={"include_usage": True}, **given))
    last = chunks.pop()
    assert last.choices == [] and last.usage == whole.usage
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    ends = [c.choices[0].finish_reason for c in chunks]
    assert ends == [None] * (len(chunks) - 1) + ["length"]
    if chat:
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    else:
        assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text


def test_a_stream_ends_with_done_in_the_form_of_server_sent_events(web):
    body = {"model": "french", "prompt": "the cat", "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{web.url}/v1/completions", json=body) as r:
        text = r.read().decode()
    assert r.headers["content-type"].startswith("text/event-stream")
    assert r.headers["x-veneer-adapters"] == "french@1"
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(e.startswith("data: {") for e in events[:-2])


def test_choices_prompts_seeds_and_logprobs(client):
    got = client.chat.completions.create(
        model="french",
        messages=[{"role": "user", "content": [{"type": "text", "text": "the cat"}]}],
        n=3,
        seed=5,
        max_completion_tokens=4,
        logprobs=True,
        top_logprobs=2,
    )
    again = client.chat.completions.create(
        model="french", messages=[{"role": "user", "content": "the cat"}], seed=6, max_tokens=4
    )
    assert [c.index for c in got.choices] == [0, 1, 2]
    assert got.choices[1].message.content == again.choices[0].message.content
    content = got.choices[0].logprobs.content
    assert content and all(len(c.top_logprobs) == 2 and c.logprob <= 0 for c in content)
    two = client.completions.create(
        model="", prompt=["the cat", "seven dogs"], n=2, max_tokens=2, temperature=0
    )
    texts = [c.text for c in two.choices]
    assert len(texts) == 4 and texts[0] == texts[1] and texts[2] == texts[3]
    assert two.usage.prompt_tokens == sum(
        len(tiny.tokenizer()(t)["input_ids"]) for t in ("the cat", "seven dogs")
    )


def test_echo_scores_the_prompt(client, oracle):
    import torch

    got = client.completions.create(model="dora", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    with torch.no_grad(), veneer.using(oracle.model, "dora"):
        logits = torch.log_softmax(oracle.model(torch.tensor([PROMPT])).logits[0, :-1], -1)
    expected = logits.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    found = got.choices[0].logprobs
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    torch.testing.assert_close(torch.tensor(found.token_logprobs[1:]), expected, rtol=1e-4, atol=1e-4)
    assert got.choices[0].text == tiny.tokenizer().decode(PROMPT) and got.usage.completion_tokens == 0


@pytest.mark.parametrize(
    ("given", "error", "code", "message"),
    [
        (dict(model="frech"), openai.NotFoundError, "model_not_found", "did you mean 'french'"),
        (dict(model="french+x@2"), openai.NotFoundError, "model_not_found", "'x' is unknown"),
        (dict(model="french@@"), openai.BadRequestError, "invalid_mixture", "NAME"),
        (dict(prompt="cat " * 400), openai.BadRequestError, "context_length_exceeded", "at most 256 tokens"),
        (dict(prompt=[5, 99999]), openai.BadRequestError, "invalid_request", "got 99999"),
        (dict(max_tokens=-1), openai.BadRequestError, "invalid_request", "max_tokens"),
        (dict(n=10**9), openai.BadRequestError, "invalid_request", "n: "),
        (dict(stop=["a"] * 99), openai.BadRequestError, "invalid_request", "stop"),
        (dict(extra_body={"best_off": 2}), openai.BadRequestError, "invalid_request", "best_off"),
        (dict(extra_body={"lora": [3]}), openai.BadRequestError, "invalid_request", "lora"),
        (
            dict(extra_body={"adapter_id": "dora"}, model="french"),
            openai.BadRequestError,
            "invalid_request",
            "differ",
        ),
    ],
)
def test_errors_are_those_that_clients_know(client, given, error, code, message):
    given = {"model": "french", "prompt": "the cat", **given}
    with pytest.raises(error, match=message) as caught:
        client.completions.create(**given)
    assert caught.value.code == code and caught.value.response.headers["x-request-id"]
    assert client.completions.create(model="french", prompt="the cat", max_tokens=1).choices


def test_an_error_in_a_stream_is_an_event(server, client):
    step = server.engine.runner.step

    def failing(works, *, decoding):
        if any(decoding):
            raise RuntimeError("planted")
        return step(works, decoding=decoding)

    server.engine.runner.step = failing
    try:
        with pytest.raises(openai.APIError, match="the engine stopped"):
            list(client.completions.create(model="french", prompt="the cat", max_tokens=20, stream=True))
        assert httpx.get(str(client.base_url).replace("/v1/", "/health")).status_code == 503
    finally:
        server.engine.runner.step = step
    deadline = time.monotonic() + 10
    while not server.supervisor.is_alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.completions.create(model="french", prompt="the cat", max_tokens=1).choices


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(server, web, stream):
    body = {"prompt": "the cat", "max_tokens": 200, "stream": stream, "ignore_eos": True, "temperature": 0}
    step, made = server.engine.runner.step, []

    def slow(works, *, decoding):
        time.sleep(0.02)
        made.append(decoding)
        return step(works, decoding=decoding)

    server.engine.runner.step = slow
    try:
        with socket.create_connection(("127.0.0.1", web.port)) as s:
            text = json.dumps(body)
            head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
            s.sendall("\r\n".join([*head, f"Content-Length: {len(text)}", "", text]).encode())
            deadline = time.monotonic() + 10
            while not server.engine.active and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.engine.active
        deadline = time.monotonic() + 60
        while server.engine.known and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not server.engine.known and len(made) < 100  # the whole answer takes 200 steps
    finally:
        server.engine.runner.step = step


def test_bodies_that_are_too_large_or_no_json_are_refused(web):
    url = f"{web.url}/v1/completions"
    kind = {"Content-Type": "application/json"}
    assert httpx.post(url, content=b"[" * 100_000, headers=kind).status_code == 400
    assert httpx.post(url, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 400
    assert httpx.post(url, content=b'{"prompt": "\\ud800"}', headers=kind).status_code == 400
    large = httpx.post(url, content=b" " * (2 << 20), headers=kind)
    assert large.status_code == 413 and large.json()["error"]["code"] == "too_large"
    chunked = httpx.post(url, content=iter([b" " * (1 << 19)] * 4), headers=kind)
    assert chunked.status_code == 413
    with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError):  # cut off
        assert httpx.get(f"{web.url}/v1/models", headers={"x": "y" * (1 << 20)}).status_code in (400, 431)
    assert httpx.get(f"{web.url}/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(f"{web.url}/health").status_code == 200


def test_tokens_and_metrics(web):
    ids = httpx.post(f"{web.url}/tokenize", json={"prompt": "the cat sat"}).json()
    assert ids["tokens"] == tiny.tokenizer()("the cat sat")["input_ids"] and ids["count"] == len(
        ids["tokens"]
    )
    text = httpx.post(f"{web.url}/detokenize", json={"tokens": ids["tokens"]}).json()
    assert text == {"prompt": "the cat sat"}
    chat = httpx.post(f"{web.url}/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["count"] > 2
    assert httpx.get(f"{web.url}/ready").status_code == 200
    metrics = httpx.get(f"{web.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(values['veneer_generation_tokens_total{model_name="tiny"}']) > 0
    assert float(values['veneer_time_to_first_token_seconds_count{model_name="tiny"}']) > 0
    assert 'veneer_adapter_tokens_total{adapter="french"}' in values


def test_keys_guard_every_path_but_health(server):
    with Background(server, keys=["one", "two"], per_minute=3) as web:
        paths = ["/", "/metrics", "/v1/models", "/openapi.json", "/ready", "/version", "/nothing"]
        assert [httpx.get(web.url + p).status_code for p in paths] == [401] * len(paths)
        posts = ["/v1/completions", "/v1/load_lora_adapter", "/tokenize", "/v1/unload_lora_adapter"]
        assert [httpx.post(web.url + p, json={}).status_code for p in posts] == [401] * len(posts)
        assert httpx.get(f"{web.url}/health").status_code == 200
        assert httpx.get(f"{web.url}/v1/models", auth=("", "two")).status_code == 200
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=f"{web.url}/v1", api_key="three").models.list()
        assert caught.value.code == "invalid_api_key"
        client = openai.OpenAI(base_url=f"{web.url}/v1", api_key="one", max_retries=0)
        for _ in range(3):
            client.completions.create(model="french", prompt="the cat", max_tokens=1)
        with pytest.raises(openai.RateLimitError, match="3 requests a minute") as limited:
            client.completions.create(model="french", prompt="the cat", max_tokens=1)
        assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60
        other = openai.OpenAI(base_url=f"{web.url}/v1", api_key="two", max_retries=0)
        assert other.completions.create(model="french", prompt="the cat", max_tokens=1).choices


def test_tenants_do_not_share_kept_beginnings(server):
    prompt = list(served.prompt(77, 120))
    with Background(server, keys=["one", "two"]) as web:

        def cached(key):
            client = openai.OpenAI(base_url=f"{web.url}/v1", api_key=key)
            got = client.completions.create(model="french", prompt=prompt, max_tokens=1)
            return got.usage.prompt_tokens_details.cached_tokens

        assert [cached(k) for k in ("one", "one", "two", "two")] == [0, 96, 0, 96]


def test_keys_are_told_apart():
    keys = Keys.of(["alpha", "beta"])
    assert [keys.tenant(k) for k in ("alpha", "beta", "gamma", "", None)] == [
        "key-1",
        "key-2",
        None,
        None,
        None,
    ]
    assert Keys().tenant(None) == ""


def test_the_time_of_a_key_does_not_depend_on_it(monkeypatch):
    from veneer.serve.http import guard

    compared, own = [], guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or own(a, b))
    keys = Keys.of(["alpha", "beta", "gamma"])
    for given in ("alpha", "gamma", "a", "", None, "alphaalpha"):
        compared.clear()
        keys.tenant(given)
        assert len(compared) == 3 and {len(part) for pair in compared for part in pair} == {32}


def test_an_allowance_counts_by_tenant():
    allowance = Allowance(at_once=1)
    assert allowance.enter("a") is None and allowance.enter("b") is None
    assert allowance.enter("a") == ("the limit is 1 requests at once", 1.0)
    allowance.leave("a")
    assert allowance.enter("a") is None


def test_loading_is_off_unless_enabled(web):
    for path, more in (("load", {"lora_path": "french"}), ("unload", {}), ("pin", {})):
        r = httpx.post(f"{web.url}/v1/{path}_lora_adapter", json={"lora_name": "x", **more})
        assert r.status_code == 403 and r.json()["error"]["code"] == "loading_disabled"


def test_adapters_are_loaded_and_unloaded_as_in_vllm(folders):
    with (
        veneer.serve(served.model(), folders, tokenizer=tiny.tokenizer(), watch=0) as server,
        Background(server, loading=True) as web,
    ):

        def post(action, **body):
            r = httpx.post(f"{web.url}/v1/{action}_lora_adapter", json=body)
            return r.status_code, r.text if r.status_code == 200 else r.json()["error"]["code"]

        added = 200, "Success: LoRA adapter 'x' added successfully."
        assert post("load", lora_name="x", lora_path="french") == added
        assert post("load", lora_name="x", lora_path="french") == (400, "already_loaded")
        assert post("load", lora_name="x", lora_path="dora", load_inplace=True) == added
        assert post("load", lora_name="tiny", lora_path="dora") == (400, "invalid_request")
        assert post("load", lora_name="../y", lora_path="dora") == (400, "invalid_request")
        for path in ("../adapters", "/etc", "..", "french/../../x", "a\0b"):
            assert post("load", lora_name="y", lora_path=path) == (400, "invalid_request")
        for path in ("nowhere", "0" * 1024, "french/adapter_config.json"):
            assert post("load", lora_name="y", lora_path=path) == (404, "not_found")
        assert post("load", lora_name="y") == (400, "invalid_request")
        assert post("pin", lora_name="x")[0] == 200 and server.registry.entries["x"].version.pinned
        assert post("unload", lora_name="x") == (200, "Success: LoRA adapter 'x' removed successfully.")
        assert post("unload", lora_name="x") == (404, "model_not_found")


def test_the_page_is_served_with_a_policy(web):
    r = httpx.get(web.url)
    assert r.status_code == 200 and "default-src 'none'" in r.headers["content-security-policy"]
    assert "http://" not in r.text.replace("http://www.w3.org", "") and "https://" not in r.text


def test_a_port_in_use_is_named():
    taken = bind("127.0.0.1", 0)
    try:
        with pytest.raises(
            ConfigError, match=rf"--port {taken.getsockname()[1]} on 127.0.0.1 cannot be used"
        ):
            bind("127.0.0.1", taken.getsockname()[1])
    finally:
        taken.close()


def test_a_closing_server_lets_answers_end(folders):
    with veneer.serve(served.model(), folders, tokenizer=tiny.tokenizer(), watch=0) as server:
        web = Background(server)
        got = []

        def ask():
            body = {
                "model": "french",
                "prompt": "the cat",
                "max_tokens": 150,
                "ignore_eos": True,
                "temperature": 0,
            }
            got.append(httpx.post(f"{web.url}/v1/completions", json=body, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.engine.active and time.monotonic() < deadline:
            time.sleep(0.005)
        web.close()
        thread.join(20)
        assert got[0].status_code == 200 and got[0].json()["usage"]["completion_tokens"] == 150
