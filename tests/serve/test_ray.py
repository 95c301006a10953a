"""The recipe for Ray Serve on this machine: adapters stay on their replica, and move when it ends."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import httpx
import pytest
import torch
from support.models import randomise

import veneer
from veneer.models import pretrained

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray
RECIPE = Path(__file__).parents[2] / "examples" / "ray_serve.py"
NAMES = [f"a{i}" for i in range(4)]
PORT = 8765


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        model = pretrained.causal_lm("builtin", torch.float32, torch.device("cpu"))
        veneer.attach(model, "lora", rank=2, name=name, to=["q_proj", "v_proj"])
        randomise(model, name, seed=seed, size=0.1)
        veneer.save(model, folder / name, name)
    return folder


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("ray_serve", RECIPE)
    made = importlib.util.module_from_spec(spec)
    sys.modules["ray_serve"] = made
    spec.loader.exec_module(made)
    ray.cloudpickle.register_pickle_by_value(made)
    return made


def test_adapters_stay_on_their_replica_and_move_when_it_ends(root, recipe):
    from ray import serve

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(recipe.app("builtin", str(root), replicas=2, watch=0))
        url = f"http://127.0.0.1:{PORT}"

        def ask(model, **more):
            body = {"model": model, "prompt": "The old man", "max_tokens": 6, "temperature": 0, **more}
            r = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
            assert r.status_code == 200, r.text
            return r.json()["choices"][0]["text"], r.headers["x-veneer-replica"]

        with veneer.serve("builtin", root, watch=0) as alone:
            expected = {n: alone.complete("The old man", n, max_tokens=6, temperature=0).text for n in NAMES}
        found = {n: {ask(n) for _ in range(3)} for n in NAMES}
        assert {n: [text for text, _ in f] for n, f in found.items()} == {n: [t] for n, t in expected.items()}
        places = {n: next(iter(f))[1] for n, f in found.items()}
        assert places == {n: str(recipe.order(n, 2)[0]) for n in NAMES} and set(places.values()) == {"0", "1"}
        with httpx.stream(
            "POST",
            f"{url}/v1/completions",
            json={"model": "a0", "prompt": "The", "max_tokens": 3, "stream": True},
            timeout=120,
        ) as r:
            assert r.read().decode().rstrip().endswith("data: [DONE]")
        missing = httpx.post(f"{url}/v1/completions", json={"model": "a9", "prompt": "The"}, timeout=120)
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
        gone = next(n for n in NAMES if places[n] == "1")
        serve.delete("default", _blocking=True)
        serve.run(recipe.app("builtin", str(root), replicas=1, watch=0))
        assert ask(gone) == (expected[gone], "0")
    finally:
        serve.shutdown()
        ray.shutdown()


def test_adapters_are_named_in_one_order_without_strengths(recipe):
    of = recipe.adapters_of
    assert of(b'{"model": "b@0.5+a"}') == of(b'{"lora": [{"id": "a"}, {"name": "b", "scale": 1}]}') == "a+b"
    assert of(b"") == of(b"not json") == of(b"[1]") == ""
    orders = {tuple(recipe.order(str(i), 3)) for i in range(60)}
    assert len(orders) == 6
