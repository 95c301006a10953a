"""Replicas of the server behind Ray Serve, with every adapter's requests on the replica that holds it.

    python examples/ray_serve.py ./llama ./adapters --replicas 4

Needs `pip install 'veneer[serve,ray]'`. The router sends a request to the replica that its adapters choose by
rendezvous hashing. A replica that does not answer is left out, and its adapters move to the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from ray import serve
from ray.util import get_node_ip_address
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

PASSED = ("authorization", "content-type", "x-request-id")


@serve.deployment
class Replica:
    """One server on a port of its own; Ray starts it again where it is not healthy."""

    def __init__(self, model: str, adapters: str, options: dict[str, Any]) -> None:
        import veneer
        from veneer.serve.http.running import Background

        self.server = veneer.serve(model, adapters, **options)
        self.web = Background(self.server, get_node_ip_address(), send_seconds=60.0)

    def url(self) -> str:
        """Returns the address of this replica."""
        return self.web.url

    def check_health(self) -> None:
        """Raises if the engine has ended, as Ray Serve wants it."""
        if not self.server.supervisor.is_alive:
            raise RuntimeError("the engine does not run")

    def __del__(self) -> None:
        self.web.close()
        self.server.close()


@serve.deployment
class Router:
    """Sends each request to the replica of its adapters."""

    def __init__(self, *replicas: Any) -> None:
        self.replicas = replicas
        self.client = httpx.AsyncClient(timeout=httpx.Timeout(600.0, connect=5.0))

    async def __call__(self, request: Request) -> Response:
        content = await request.body()
        headers = {k: v for k in PASSED if (v := request.headers.get(k)) is not None}
        for number in order(adapters_of(content), len(self.replicas)):
            try:
                url = await self.replicas[number].url.remote()
                asked = self.client.build_request(
                    request.method, url + request.url.path, content=content, headers=headers
                )
                answer = await self.client.send(asked, stream=True)
            except Exception:  # Ray's errors of a replica that has ended, and httpx's of one that is away
                continue
            if answer.status_code == 503:
                await answer.aclose()
                continue
            kept = {"x-veneer-replica": str(number), "content-type": answer.headers.get("content-type", "")}
            kept |= {k: v for k in ("retry-after", "x-veneer-adapters") if (v := answer.headers.get(k))}
            return StreamingResponse(_parts(answer), answer.status_code, kept)
        body = {"message": "no replica answers", "type": "server_error", "param": None, "code": "unavailable"}
        return JSONResponse({"error": body}, 503, {"Retry-After": "2"})


async def _parts(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()


def adapters_of(content: bytes) -> str:
    """Returns the adapters that a request names, without strengths and in one order; "" for the base."""
    try:
        body = json.loads(content or b"{}")
        listed = [str(e.get("name", e.get("id"))) for e in body.get("lora") or []]
        named = str(body.get("adapter_id") or body.get("model") or "")
    except (ValueError, AttributeError):
        return ""
    names = listed or [part.partition("@")[0] for part in re.split(r"(?<!@)\+", named)]
    return "+".join(sorted(names))


def order(adapters: str, n: int) -> list[int]:
    """Returns the replicas from the preferred one on: when one goes, only its own adapters move."""
    weights = [hashlib.sha256(f"{number} {adapters}".encode()).digest() for number in range(n)]
    return sorted(range(n), key=weights.__getitem__, reverse=True)


def app(model: str, adapters: str, *, replicas: int = 2, cpus: float = 1, gpus: float = 0, **options: Any):
    """Returns the application: a router, and so many servers with these options of veneer.serve."""
    needs = {"num_cpus": cpus, "num_gpus": gpus}
    made = [
        Replica.options(name=f"replica-{i}", ray_actor_options=needs).bind(model, adapters, options)
        for i in range(replicas)
    ]
    return Router.options(ray_actor_options={"num_cpus": 0}).bind(*made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("adapters")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of one replica")
    args = parser.parse_args()
    serve.run(app(args.model, args.adapters, replicas=args.replicas, gpus=args.gpus))
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
