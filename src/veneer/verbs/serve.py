"""`veneer serve`: a base model and any number of adapters behind OpenAI's interface."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.embedded.texts import has
from veneer.errors import ConfigError
from veneer.models import adapted

KEYS = "VENEER_API_KEYS"
DEMO = {
    "prose": 5e-3,
    "c": 5e-3,
}  # the texts of the demo's adapters and their learning rates, see verbs/demo.py
DEMO_STEPS = 60


def serve(
    model: str | None = None,
    *,
    adapters: str | None = None,
    adapter: Sequence[str] = (),
    demo: bool = False,
    batch: str | None = None,
    out: str | None = None,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    key_file: str | None = None,
    allow_loading: bool = False,
    allow_host: Sequence[str] = (),
    at_once: int = 0,
    per_minute: int = 0,
    seconds: float = 600.0,
    body_size: int = 8,
    device: str = "auto",
    dtype: str = "float32",
    allow: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Serves until SIGINT or SIGTERM, or answers the requests of a file.

    model: name or folder of the base; the one that the adapters were made for unless given, or the built-in
    one adapters: root folder; every adapter under it is served by its folder's name, new and changed ones are
    noticed adapter: FOLDER or NAME=FOLDER of one adapter; may be given several times, instead of a root demo:
    serve the built-in model with two adapters, which are trained first where they are missing (about a
    minute) batch: file of requests, a JSON object a line as in OpenAI's batches; answered without a network
    out: file for the answers of --batch; BATCH.answers.jsonl unless given name: name of the base in requests
    host: address to listen on; others than this machine can reach the server at 0.0.0.0 port: port to listen
    on; 0 for a free one key_file: file of API keys, one a line; VENEER_API_KEYS holds keys too, with commas
    allow_loading: let requests load, unload and pin adapters under the root allow_host: names that clients
    may call this machine by; any where keys are set or the address is public at_once: requests of one key at
    once; 0 for no limit per_minute: requests of one key in a minute; 0 for no limit seconds: longest time of
    one answer body_size: largest body of a request, in MiB device: where to compute: cpu, cuda, or auto
    dtype: of the base: float32, bfloat16 or float16 allow: problems to let through when adapters are loaded,
    see veneer.load
    """
    _check_packages(batch is not None)
    from veneer.serve.http import offline, running
    from veneer.serve.start import serve as start

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    given, base = _chosen(model, adapters, adapter, demo)
    keys = _keys(key_file)
    listening = None if batch is not None else running.bind(host, port)
    with start(base, given, name=name, device=device, dtype=dtype, allow=tuple(allow), **options) as server:
        if batch is not None:
            answers = Path(out or f"{batch}.answers.jsonl")
            return {**offline.answer(server, Path(batch), answers).as_dict(), "answers": str(answers)}
        assert listening is not None
        print(_greeting(server, host, listening.getsockname()[1]), file=sys.stderr, flush=True)
        web = dict(loading=allow_loading, seconds=seconds, body_bytes=body_size << 20)
        limits = dict(at_once=at_once, per_minute=per_minute, keys=keys, hosts=tuple(allow_host))
        running.run(server, listening, host, **web, **limits)
    return {}


def text(found: dict[str, Any]) -> str:
    """Returns the counts of an answered file as a line."""
    if not found:
        return ""
    return f"{found['answered']} answered, {found['failed']} failed, {found['kept']} kept: {found['answers']}"


def _check_packages(offline: bool) -> None:
    wanted = {"transformers": "text", "pydantic": "serve"}
    if not offline:
        wanted |= dict.fromkeys(("fastapi", "uvicorn", "sse_starlette", "prometheus_client"), "serve")
    missing = []
    for package in wanted:
        try:
            __import__(package)
        except ModuleNotFoundError:
            missing.append(package)
    if missing:
        extras = ",".join(sorted({wanted[p] for p in missing}))
        raise ConfigError(f"veneer serve needs {', '.join(missing)}: pip install 'veneer[{extras}]'")


def _chosen(model: str | None, root: str | None, each: Sequence[str], demo: bool) -> tuple[Any, str]:
    """Returns the adapters, as a root folder or by name, and the base."""
    if sum([root is not None, bool(each), demo]) > 1:
        raise ConfigError("give one of --adapters, --adapter and --demo")
    if demo:
        return _demo(), model or "builtin"
    if root is not None:
        return root, model or _base_of(Path(root))
    wanted = adapted.there(each)
    folders = {w.name: adapted.adapter_folder(w.folder) for w in wanted}
    return folders, model or (adapted.base_of(wanted) if wanted else "builtin")


def _base_of(root: Path) -> str:
    """Returns the base that the adapters under a root were made for, or the built-in model for an empty
    root.
    """
    if not root.is_dir():
        raise ConfigError(f"--adapters must be a folder, got {str(root)!r}; make it first")
    from veneer.serve.adapters.reading import is_adapter

    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and is_adapter(adapted.adapter_folder(p))]
    wanted = [adapted.Wanted(p.name, p, 1.0) for p in folders]
    return adapted.base_of(wanted) if wanted else "builtin"


def _demo() -> str:
    """Trains the demo's adapters where they are missing, and returns their root."""
    from veneer.runs.fit import fit
    from veneer.train.run import Run

    root = Path("runs") / "serve-demo"
    for target, rate in DEMO.items():
        if not has(target) or (root / target / "adapter").is_dir():
            continue
        print(f"training the demo's adapter {target!r}: {DEMO_STEPS} steps", file=sys.stderr, flush=True)
        data = (f"builtin:{target}",)
        fit(
            Run(
                model="builtin",
                data=data,
                lr=rate,
                steps=DEMO_STEPS,
                batch=4,
                length=256,
                options={"rank": 8},
                report=False,
                out=str(root / target),
            ),
            progress=True,
        )
    return str(root)


def _keys(file: str | None) -> list[str]:
    given = os.environ.get(KEYS, "").split(",")
    if file is not None:
        try:
            given += Path(file).read_text(encoding="utf-8").splitlines()
        except OSError as e:
            raise ConfigError(f"--key-file {file} cannot be read: {e.strerror}") from None
    found = [k.strip() for k in given if k.strip()]
    if file is not None and not found:
        raise ConfigError(f"--key-file {file} holds no key; write one a line")
    return found


def _greeting(server: Any, host: str, port: int) -> str:
    names = server.adapters()
    shown = f"{len(names)} adapters" if len(names) > 8 else ", ".join(names) or "no adapters"
    where = f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{port}"
    return f"serving {server.name} with {shown} at {where} (the page) and {where}/v1 (OpenAI's interface)"
