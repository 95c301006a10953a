"""`veneer data prepare`: writes the texts of a run as token shards, once for many trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, option
from veneer.files import clean
from veneer.runs import prepare as reading
from veneer.runs.texts import shards, texts
from veneer.train.folder import lock
from veneer.train.loop.progress import Voice
from veneer.train.run import Run
from veneer.units import size


def prepare(
    run: Run, out: str | Path, *, progress: bool = True, tokens: int = shards.TOKENS
) -> dict[str, Any]:
    """Writes the texts of a run into folder `out`, and returns its index with the bytes written.

    Encoded rows are kept until the index is written, so that the same command goes on after a kill. tokens:
    of a shard, about. Raises ConfigError for a folder with other files, and the errors of reading texts.
    """
    out, voice = Path(out), Voice(progress)
    _check_free(out)
    if run.stream:
        raise ConfigError(
            f"data prepare reads texts as a whole, which {option('stream')} does not; leave it out"
        )
    if shards.is_shards(run.data):
        raise ConfigError(f"{run.data[0]} holds token shards already; give its texts")
    run = texts.named(run)
    given = {name: getattr(run, name) for name in shards.KEY if name not in ("length", "eval_by")}
    out.mkdir(parents=True, exist_ok=True)
    with lock.held(out):
        clean(out)
        with voice.phase("encoding texts"):
            run, task, encoded = reading.encoded_texts(run, voice, encode=shards.encoder(out, given))
        found = texts.prepare_all(encoded, task, voice)
        with voice.phase("writing shards"):
            index = shards.write(out, run, task, found, voice.said, tokens)
    return {"folder": str(out), "bytes": sum(p.stat().st_size for p in out.iterdir()), **index}


def _check_free(out: Path) -> None:
    """Raises ConfigError for a folder that holds other files than those of an unfinished preparation."""
    if (out / shards.INDEX).exists():
        raise ConfigError(f"{option('out')} {out} holds token shards already; choose another, or remove it")
    others = [p.name for p in out.iterdir() if not _is_ours(p.name)] if out.is_dir() else []
    if others or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{option('out')} {out} holds other files; choose another folder")


def _is_ours(name: str) -> bool:
    return name.startswith(".") or name.endswith((".safetensors", "-rows.json")) or name == lock.NAME


def text(found: dict[str, Any]) -> str:
    """Returns the outcome for people."""
    lines = [f"{found['folder']}: {size(found['bytes'])}, length {found['reading']['length']}"]
    for part, own in found["parts"].items():
        counts = ", ".join(
            f"{own['facts'][n]:,} {n.replace('_', ' ')}" for n in ("rows", "windows", "tokens")
        )
        lines.append(f"{part}: {counts} in {len(own['shards'])} shards")
    return "\n".join([*lines, f"train on them: veneer fit --data {found['folder']}"])
