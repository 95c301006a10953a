"""`veneer push`: an adapter acts on the server as it does here, or is unloaded; on a stand-in for vLLM."""

from __future__ import annotations

import re

import pytest
import torch
from support.models import randomise
from support.standin import StandIn

import veneer
from veneer.cli.frame import main
from veneer.models import pretrained
from veneer.serve.http.running import Background
from veneer.verbs.push.push import KEY, push


def builtin():
    return pretrained.causal_lm("builtin", torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder of an adapter of the built-in model."""
    model = builtin()
    veneer.attach(model, "lora", rank=3, name="notes", to=["q_proj", "v_proj", "down_proj"])
    randomise(model, "notes", size=0.05)
    return veneer.save(model, tmp_path_factory.mktemp("adapters") / "notes", "notes")


def test_an_adapter_acts_there_as_it_does_here(adapter, tmp_path, capsys):
    with StandIn(builtin()) as server:
        assert main(["push", str(adapter), server.url, "--out", str(tmp_path / "served")]) == 0
        assert re.search(
            r"notes acts on \S+: its effect on 16 tokens differs by 0\.0%", capsys.readouterr().out
        )
        assert server.adapters == {"notes": tmp_path / "served"}
        again = push(str(adapter), f"{server.url}/v1/", out=str(tmp_path / "b"), name="x", limit=1e-3)
        assert (
            again.good
            and "--max-lora-rank 8" in again.notes[-1]
            and again.change > 0.01
            and again.base_off < 1e-4
        )
        with pytest.raises(Exception, match=r"answered 400: The lora adapter 'x' has already been loaded"):
            push(str(adapter), server.url, out=str(tmp_path / "c"), name="x")
        assert push(str(adapter), server.url, out=str(tmp_path / "d"), name="x", replace=True).good


def test_an_adapter_without_effect_is_unloaded(adapter, tmp_path, capsys):
    with StandIn(builtin(), ignores=True) as server:
        assert main(["push", str(adapter), server.url, "--out", str(tmp_path / "served")]) == 3
        assert "notes was unloaded from" in (out := capsys.readouterr().out) and "100.0%" in out
        assert server.adapters == {}


def test_another_base_there_is_found(adapter, tmp_path):
    other = builtin()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    with StandIn(other) as server:
        found = push(str(adapter), server.url, out=str(tmp_path / "served"))
        assert not found.good and found.base_off > 0.1 and server.adapters == {}


def test_our_own_server_is_proven_too(adapter, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with (
        veneer.serve("builtin", root, watch=0) as server,
        Background(server, loading=True, keys=["secret"]) as web,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv(KEY, "secret")
        found = push(str(adapter), web.url, out=str(root / "served"), path="served", name="own", limit=1e-3)
        assert found.good and server.adapters() == ["own"]


def test_refusals_say_what_to_do(adapter, tmp_path):
    out = str(tmp_path / "served")
    with StandIn(builtin(), updating=False) as server:
        with pytest.raises(Exception, match="404: Not Found; start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPD"):
            push(str(adapter), server.url, out=out)
        with pytest.raises(Exception, match="to: unknown server 'vlm'; did you mean 'vllm'"):
            push(str(adapter), server.url, out=out, to="vlm")
    with StandIn(builtin(), key="k") as server:
        with pytest.raises(Exception, match="answered 401: Unauthorized"):
            push(str(adapter), server.url, out=str(tmp_path / "b"))
    with StandIn(builtin()) as server:
        with pytest.raises(Exception, match="404: Loading lora notes failed"):
            push(str(adapter), server.url, out=str(tmp_path / "c"), path="/nowhere")
    with pytest.raises(Exception, match=r"cannot be reached: .*; start the server first"):
        push(str(adapter), "http://127.0.0.1:9", out=str(tmp_path / "d"))
    with pytest.raises(Exception, match="url must be http://HOST:PORT"):
        push(str(adapter), "localhost:8000", out=str(tmp_path / "d"))
    assert not (tmp_path / "d").exists()
