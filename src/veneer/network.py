"""Keeps libraries from waiting for a Hugging Face hub that cannot be reached."""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE = 3.0  # seconds; the libraries' own retries take most of a minute


@contextmanager
def hub(name: str) -> Iterator[None]:
    """Lets libraries look a name up within the block: in the hub's cache alone if the hub cannot be reached.

    Does nothing for an existing path.
    """
    if Path(name).exists() or reachable():
        yield
        return
    from huggingface_hub import constants

    places = [constants, *(m for m in [sys.modules.get("datasets.config")] if m is not None)]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


@functools.cache
def reachable() -> bool:
    """Returns True if the hub's host answers, or if a proxy stands in between."""
    if getproxies():
        return True
    parts = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = parts.port or (80 if parts.scheme == "http" else 443)
    answers: list[bool] = []

    def ask() -> None:
        try:
            socket.create_connection((parts.hostname, port), timeout=PATIENCE).close()
        except OSError:
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # a resolver may wait for longer than any timeout
    thread.start()
    thread.join(PATIENCE)
    return bool(answers)
