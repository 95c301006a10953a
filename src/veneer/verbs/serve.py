"""`veneer serve`: a base model and any number of adapters behind OpenAI's interface."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from veneer import files, settings
from veneer.embedded.texts import has
from veneer.errors import ConfigError
from veneer.models import adapted
from veneer.serve.options import Options
from veneer.settings import setting

KEYS = "VENEER_API_KEYS"
DEMO = {
    "prose": 5e-3,
    "c": 5e-3,
}  # learning rates of two demo adapters, by text; see verbs/demo/contenders.py
DEMO_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class Chosen(settings.Settings):
    """The base and its adapters."""

    PANEL = "Model and adapters"

    adapters: str | None = setting(
        None, "root folder: each adapter under it is served by its folder's name, new and changed ones too"
    )
    adapter: tuple[str, ...] = setting(
        (), "FOLDER or NAME=FOLDER of one adapter; may be given several times, instead of a root"
    )
    demo: bool = setting(
        False, "serve the built-in model with two adapters, which are trained first where they are missing"
    )
    name: str | None = setting(None, "name of the base in requests")
    device: str = setting("auto", "where to compute: cpu, cuda, or auto")
    dtype: str = setting("fp32", "number format of the base: fp32, bf16 or fp16")
    allow: tuple[str, ...] = setting((), "problems to let through when adapters are loaded, see veneer.load")


@dataclass(frozen=True, kw_only=True)
class Network(settings.Settings):
    """The address, and what clients may do."""

    PANEL = "Network"

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = setting(8000, "port to listen on; 0 for a free one")
    key_file: str | None = setting(
        None, f"file of API keys, one a line; {KEYS} holds keys too, with commas between them"
    )
    allow_loading: bool = setting(False, "let requests load, unload and pin adapters under the root")
    allow_host: tuple[str, ...] = setting(
        (), "names that the Host header may have; this machine's own on a loopback address, else any"
    )
    at_once: int = setting(0, "requests of one key at once; 0 for no limit")
    per_minute: int = setting(0, "requests of one key in a minute; 0 for no limit")
    seconds: float = setting(600.0, "longest time of one answer", unit="seconds")
    body_size: int = setting(8, "largest body of a request", unit="MiB")


@dataclass(frozen=True, kw_only=True)
class Offline(settings.Settings):
    """Requests of a file instead of a network's."""

    PANEL = "Offline"

    batch: str | None = setting(None, "file of requests, a JSON object a line as in OpenAI's batches")
    out: str | None = setting(None, "file for the answers of --batch; BATCH.answers.jsonl unless given")


@dataclass(frozen=True, kw_only=True)
class Serving(Offline, Options, Network, Chosen):
    """All settings of the command."""

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range or contradiction."""
        yield from super().problems()
        if sum([self.adapters is not None, bool(self.adapter), self.demo]) > 1:
            yield "give one of --adapters, --adapter and --demo"
        if self.out is not None and self.batch is None:
            yield "out needs --batch"


def serve(model: str | None = None, **given: Any) -> dict[str, Any]:
    """Serves until SIGINT or SIGTERM, or answers the requests of a file and returns counts.

    model: name or folder of the base; the adapters' own unless given, or the built-in model. given: see
    Serving.
    """
    s = Serving(**given)
    _check_packages(s.batch is not None)
    from veneer.serve.http import offline, running

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    adapters, base = _chosen(model, s)
    if s.batch is not None:
        lines, answers = offline.read(Path(s.batch)), Path(s.out or f"{s.batch}.answers.jsonl")
        if problem := files.unusable(answers, new=False):
            raise ConfigError(problem)
        with _server(base, adapters, s) as server:
            return {**offline.answer(server, lines, answers).as_dict(), "answers": str(answers)}
    keys, listening = _keys(s.key_file), running.bind(s.host, s.port)
    with _server(base, adapters, s) as server:
        print(_greeting(server, s.host, listening.getsockname()[1]), file=sys.stderr, flush=True)
        web = dict(keys=keys, hosts=s.allow_host, loading=s.allow_loading, body_bytes=s.body_size << 20)
        limits = dict(seconds=s.seconds, at_once=s.at_once, per_minute=s.per_minute)
        running.run(server, listening, s.host, **web, **limits)
    return {}


def _server(base: str, adapters: Any, s: Serving) -> Any:
    from veneer.serve.start import serve as start

    options = {f.name: getattr(s, f.name) for f in fields(Options)}
    return start(base, adapters, name=s.name, device=s.device, dtype=s.dtype, allow=s.allow, **options)


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


def _chosen(model: str | None, s: Serving) -> tuple[Any, str]:
    """Returns the adapters, as a root folder or by name, and the base."""
    if s.demo:
        return _demo(), model or "builtin"
    if s.adapters is not None:
        return s.adapters, model or _base_of(Path(s.adapters))
    wanted = adapted.there(s.adapter)
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
