"""Speaks vLLM's interface: models, adapters, and log-probabilities of given tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from veneer import foreign
from veneer.errors import ConfigError, VeneerError

SECONDS = 300.0  # a server may read an adapter for a while
LONGEST = 500  # characters of an answer in a message


class Refused(VeneerError):
    """The server answered with an error. status: of the HTTP answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Remote:
    """A server at a URL such as http://localhost:8000, with the key that it may need."""

    def __init__(self, url: str, key: str = "") -> None:
        """Raises ConfigError unless the URL names a host over HTTP."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url must be http://HOST:PORT or https://HOST, got {url!r}")
        self.url, self.key = url.rstrip("/").removesuffix("/v1"), key

    def base(self) -> str:
        """Returns the name of the served base: the first model without a parent."""
        cards = self._ask("/v1/models")["data"]
        return next(str(c["id"]) for c in cards if c.get("parent") is None)

    def load(self, name: str, path: str, *, replace: bool) -> None:
        """Has the server load an adapter from a folder that it sees under `path`.

        Raises Refused with the server's reason, and with a remedy if loading is switched off.
        """
        body = {"lora_name": name, "lora_path": path, "load_inplace": replace}
        try:
            self._ask("/v1/load_lora_adapter", body)
        except Refused as e:
            off = e.status == 403 or (e.status == 404 and "Not Found" in str(e))
            how = "; start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora" if off else ""
            raise Refused(f"{e}{how}", e.status) from None

    def unload(self, name: str) -> None:
        """Has the server forget an adapter."""
        self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def logprobs(self, model: str, tokens: Sequence[int]) -> list[float]:
        """Returns the log-probability of each token but the first, given those before it."""
        body = {"model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0}
        choice = self._ask("/v1/completions", {**body, "echo": True, "logprobs": 1})["choices"][0]
        found = choice["logprobs"]["token_logprobs"][1 : len(tokens)]
        return [float(v) for v in found]

    def _ask(self, path: str, body: Any = None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        content = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.url + path, content, headers), timeout=SECONDS) as answer:
                text = answer.read().decode()
        except HTTPError as e:
            raise Refused(f"{self.url}{path} answered {e.code}: {_reason(e)}", e.code) from None
        except (URLError, OSError) as e:
            why = getattr(e, "reason", e)
            raise ConfigError(f"{self.url} cannot be reached: {why}; start the server first") from None
        return foreign.loads(text) if text.startswith("{") else text


def _reason(e: HTTPError) -> str:
    """Returns the message of an error's body, in OpenAI's shape or in another."""
    text = e.read().decode(errors="replace")
    try:
        found = foreign.loads(text)
        found = found.get("error", found.get("detail", found))
        return str(found.get("message", found) if isinstance(found, dict) else found)[:LONGEST]
    except (ValueError, AttributeError):
        return text[:LONGEST]
