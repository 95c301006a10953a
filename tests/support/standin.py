"""A stand-in for vLLM: its adapter endpoints and error bodies over HTTP, with PEFT behind them.

Written from vLLM 0.33's documented interface; vLLM itself needs a GPU build and is not run here.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch


class StandIn:
    """Serves one base on a free port. ignores: adapters are accepted and have no effect."""

    def __init__(self, model: Any, *, updating: bool = True, ignores: bool = False, key: str = "") -> None:
        self.base, self.updating, self.ignores, self.key = model, updating, ignores, key
        self.adapters: dict[str, Path] = {}
        self.peft: Any = None
        self.lock = threading.Lock()

    def __enter__(self) -> StandIn:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.http.shutdown()
        self.http.server_close()

    def load(self, name: str, path: str, inplace: bool) -> tuple[int, Any]:
        from peft import PeftModel

        if name in self.adapters and not inplace:
            text = f"The lora adapter '{name}' has already been loaded."
            return 400, _error(400, "InvalidUserInput", text)
        if not (Path(path) / "adapter_config.json").is_file():
            return 404, _error(
                404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}"
            )
        with self.lock:
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.base, path, adapter_name=name)
            else:
                if name in self.adapters:
                    self.peft.delete_adapter(name)
                self.peft.load_adapter(path, name)
            self.adapters[name] = Path(path)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> tuple[int, Any]:
        if self.adapters.pop(name, None) is None:
            return 404, _error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        model, ids = body["model"], torch.tensor([body["prompt"]])
        if model not in ("base", *self.adapters):
            return 404, _error(404, "NotFoundError", f"The model `{model}` does not exist.")
        with self.lock:
            if self.peft is None:
                logits = self.base(ids).logits
            elif model == "base" or self.ignores:
                with self.peft.disable_adapter():
                    logits = self.peft(input_ids=ids).logits
            else:
                self.peft.set_adapter(model)
                logits = self.peft(input_ids=ids).logits
        own = torch.log_softmax(logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]
        assert body["echo"] and body["logprobs"] is not None
        return 200, {"choices": [{"text": "", "logprobs": {"token_logprobs": [None, *own.tolist(), -1.0]}}]}

    def models(self) -> dict[str, Any]:
        cards = [{"id": "base", "root": "/models/base", "parent": None}]
        cards += [{"id": n, "root": str(p), "parent": "base"} for n, p in self.adapters.items()]
        return {"object": "list", "data": cards}

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Returns the status and the body of an answer."""
        if path == "/v1/models":
            return 200, self.models()
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/v1/load_lora_adapter" and self.updating:
            return self.load(body["lora_name"], body["lora_path"], body.get("load_inplace", False))
        if path == "/v1/unload_lora_adapter" and self.updating:
            return self.unload(body["lora_name"])
        return 404, {"detail": "Not Found"}


def _error(status: int, kind: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _handler(server: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*self._answered({}))

        def do_POST(self) -> None:
            self._send(*self._answered(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _answered(self, body: dict[str, Any]) -> tuple[int, Any]:
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                return 401, {"error": "Unauthorized"}
            return server.answer(self.path, body)

        def _send(self, status: int, content: Any) -> None:
            text = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *given: Any) -> None:
            pass

    return Handler
