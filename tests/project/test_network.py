"""A hub that cannot be reached is not waited for."""

from __future__ import annotations

import socket
import time

import pytest

from veneer import network
from veneer.errors import ConfigError
from veneer.models import pretrained


@pytest.fixture
def unreachable(monkeypatch):
    def refuse(*given, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(network, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", refuse)
    network.reachable.cache_clear()
    yield
    network.reachable.cache_clear()


def test_a_name_of_the_hub_fails_at_once_without_a_network(unreachable):
    pretrained.config("builtin")  # the library's own imports are not what is timed
    begun = time.process_time(), time.monotonic()
    with pytest.raises(ConfigError, match="neither a folder here nor in the cache, and the Hugging Face hub"):
        pretrained.tokenizer("no-such-user/no-such-model")
    assert time.process_time() - begun[0] < 2 and time.monotonic() - begun[1] < 30


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(network, "getproxies", dict)
    monkeypatch.setattr(network, "PATIENCE", 0.05)
    monkeypatch.setattr(
        socket, "create_connection", lambda *given, **options: time.sleep(1) or socket.socket()
    )
    network.reachable.cache_clear()
    begun = time.monotonic()
    assert not network.reachable() and time.monotonic() - begun < 2
    network.reachable.cache_clear()


def test_offline_is_undone_and_not_set_for_folders(unreachable, tmp_path):
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with network.hub("someone/something"):
        assert constants.HF_HUB_OFFLINE
    with network.hub(str(tmp_path)):
        assert constants.HF_HUB_OFFLINE == before
    assert constants.HF_HUB_OFFLINE == before


def test_a_proxy_is_taken_for_a_way_out(monkeypatch):
    monkeypatch.setattr(network, "getproxies", lambda: {"https": "http://proxy:3128"})
    network.reachable.cache_clear()
    assert network.reachable()
    network.reachable.cache_clear()
