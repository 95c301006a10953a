"""Token shards: the texts of a run as memory-mapped windows with loss masks, written once, with hashes.

A folder holds `index.json`, written last, and safetensors files that it vouches for. Training windows are
read where they are used. Measured texts keep their rows too, as `eval_windows` chooses among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from veneer.data.order.mapped import Mapped
from veneer.data.reading import NO_TEXT, Reading
from veneer.errors import ConfigError, DataError, FormatError, first_few, option
from veneer.files import read_json, read_tensors, replacing, sha256, write_json, write_tensors
from veneer.runs.texts.encoded import LeftOut, encode_rows
from veneer.runs.texts.rows_kept import as_tensors, from_tensors, rows_as_json, rows_of_json
from veneer.runs.texts.texts import Text
from veneer.tasks import Task
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.causal_lm import CausalLM
from veneer.train.run import Run

INDEX, FORMAT, VERSION = "index.json", "veneer.token-shards", 1
TOKENS = 1 << 24  # of a shard: 200 MB, as a token takes 12 bytes
ROWS = 1000  # encoded at a time, and kept until the index is written
# Settings that decide the windows, besides the tokenizer and the texts.
KEY = tuple(f.name for f in fields(Reading) if f.name != "allow")
TEXTS = ("valid", "test", "known")
Encode = Callable[[Mapping[str, Sequence[Any]], Task], dict[str, list[Encoded]]]


def is_shards(names: Sequence[str]) -> bool:
    """Tells if the texts of a run are one folder of token shards."""
    if not any((Path(name) / INDEX).is_file() for name in names):
        return False
    if len(names) > 1:
        raise ConfigError(
            f"{option('data')} must name one folder of token shards alone, got {first_few(names)}"
        )
    return read_json(Path(names[0]) / INDEX).get("format") == FORMAT


def tokenizer_key(task: Task) -> str:
    """Returns a hash of the tokenizer: its vocabulary, rules, special tokens and chat template."""
    own = task.processor
    backend = getattr(own, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(own.get_vocab(), sort_keys=True)
    more = json.dumps([own.special_tokens_map, own.chat_template], sort_keys=True, default=str)
    return hashlib.sha256(f"{rules}\n{more}".encode()).hexdigest()


# -- writing -------------------------------------------------------------------------------------------------


def check_task(task: Task) -> None:
    """Raises ConfigError for a task of another kind than causal language modelling."""
    if not isinstance(task, CausalLM):
        raise ConfigError(f"data prepare writes windows of causal language models, got {type(task).__name__}")


def encoder(out: Path, given: Mapping[str, Any]) -> Encode:
    """Returns a function that encodes the rows of all parts and keeps them in `out` for a later process.

    given: all that the tokens depend on. Raises the errors of unreadable rows.
    """

    def encode(rows: Mapping[str, Sequence[Any]], task: Task) -> dict[str, list[Encoded]]:
        check_task(task)
        own = {**given, "tokenizer": tokenizer_key(task)}
        return {
            part: [
                one
                for at in range(0, len(some), ROWS)
                for one in _block(out, own, some[at : at + ROWS], task)
            ]
            for part, some in rows.items()
        }

    return encode


def _block(out: Path, given: Mapping[str, Any], rows: Sequence[Any], task: Task) -> list[Encoded]:
    """Returns rows as tokens, from the file of an earlier process if there is a whole one."""
    content = json.dumps([given, rows_as_json(rows)], sort_keys=True, default=str)
    path = out / f"tokens-{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            return from_tensors(read_tensors(path), rows)
        except (FormatError, KeyError, ValueError, RuntimeError):
            path.unlink()
    found = encode_rows(rows, task)
    with replacing(path) as (temporary,):
        write_tensors(temporary, as_tensors(found))
    return found


def write(
    out: Path, run: Run, task: Task, found: Mapping[str, Text], notes: Sequence[str], tokens: int = TOKENS
) -> dict[str, Any]:
    """Writes the texts of a run, the index last, and returns the index. tokens: of a shard, about."""
    parts = {part: _write_part(out, part, text, task, tokens) for part, text in found.items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": tokenizer_key(task),
        "task": run.task,
        "task_options": run.task_options,
        "add_tokens": list(run.add_tokens),
        "reading": {name: getattr(run, name) for name in KEY},
        "texts": {name: list(getattr(run, name)) for name in ("data", *TEXTS)},
        "seed": run.seed,
        "parts": parts,
        "notes": list(notes),
    }
    content = dict(json.loads(json.dumps(content)))
    with replacing(out / INDEX) as (temporary,):
        write_json(temporary, {**content, "sha256": _digest(content)})
    for path in out.glob("tokens-*.safetensors"):
        path.unlink()
    return content


def _write_part(out: Path, part: str, text: Text, task: Task, tokens: int) -> dict[str, Any]:
    shards = []
    for number, some in enumerate(_shards(text.examples, task, tokens)):
        path = out / f"{part}-{number:05d}.safetensors"
        with replacing(path) as (temporary,):
            write_tensors(temporary, task.as_tensors(some))
        shards.append({**_file(path), "windows": len(some)})
    own: dict[str, Any] = {"facts": text.facts, "left_out": text.left_out._asdict(), "shards": shards}
    if part != "train":
        paths = [out / f"{part}-rows.safetensors", out / f"{part}-rows.json"]
        with replacing(*paths) as temporary:
            write_tensors(temporary[0], as_tensors(text.kept))
            write_json(temporary[1], {"rows": rows_as_json([one.row for one in text.kept])})
        own["rows"] = [_file(path) for path in paths]
    return own


def _shards(examples: Sequence[Any], task: Task, tokens: int) -> Iterator[list[Any]]:
    """Yields the examples in runs of about so many tokens."""
    some: list[Any] = []
    held = 0
    for example in examples:
        some.append(example)
        held += task.size(example)
        if held >= tokens:
            yield some
            some, held = [], 0
    if some:
        yield some


def _file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- reading -------------------------------------------------------------------------------------------------


def settled(run: Run) -> Run:
    """Returns the run with the settings of reading and the texts that its shards were made with.

    Raises DataError for damaged shards, and ConfigError for settings that differ.
    """
    index, problems = _index(run), []
    then = {**index["reading"], **{n: index["texts"][n] for n in TEXTS}, "add_tokens": index["add_tokens"]}
    then = {n: tuple(v) if isinstance(v, list) else v for n, v in then.items()}
    if run.task != index["task"]:
        problems.append(f"task must be {index['task']!r}, got {run.task!r}")
    for name, value in then.items():
        own = getattr(run, name)
        usual = own == getattr(Run, name, None) or own in ((), {}, (NO_TEXT,)) or own == ("builtin:known",)
        if own != value and not usual:
            problems.append(f"{name} must be {value!r} or left out, got {own!r}")
    if run.stream or run.cache_frozen:
        problems.append(
            "stream and cache_frozen need texts, and these are windows on disk already; leave them out"
        )
    if problems:
        raise ConfigError(
            "\n".join(
                f"{run.data[0]} was prepared with other settings: {p}; or prepare it again" for p in problems
            )
        )
    return replace(run, **then, task_options=index["task_options"])


def _index(run: Run) -> dict[str, Any]:
    """Returns the index. Raises DataError if it is damaged or of a later version."""
    path = Path(run.data[0]) / INDEX
    content = read_json(path)
    own = {k: v for k, v in content.items() if k != "sha256"}
    if own.get("version") != VERSION:
        raise DataError(f"{path}: version must be {VERSION}, got {own.get('version')}; prepare it again")
    if _digest(own) != content.get("sha256"):
        raise DataError(f"{path} is damaged: its SHA-256 differs; prepare the texts again")
    return own


def texts_of(run: Run, task: Task) -> tuple[dict[str, Text], list[str]]:
    """Returns the texts by part, and the notes of their reading.

    Raises DataError for shards of another tokenizer, and one for all damaged files.
    """
    folder, index = Path(run.data[0]), _index(run)
    if tokenizer_key(task) != index["tokenizer"]:
        raise DataError(
            f"{folder} was prepared with another tokenizer or chat template than that of {run.model!r};"
            " give the model it was prepared with, or prepare it again"
        )
    every = [f for part in index["parts"].values() for f in [*part["shards"], *part.get("rows", ())]]
    damaged = [f["file"] for f in every if _differs(folder / f["file"], f)]
    if damaged:
        raise DataError(
            f"{folder}: {len(damaged)} of {len(every)} files are missing or damaged: {first_few(damaged)};"
            " prepare the texts again"
        )
    return {part: _text(folder, part, own) for part, own in index["parts"].items()}, index["notes"]


def _differs(path: Path, entry: Mapping[str, Any]) -> bool:
    return not path.is_file() or path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]


def _text(folder: Path, part: str, own: Mapping[str, Any]) -> Text:
    examples: Any = Mapped(folder / entry["file"] for entry in own["shards"])
    left_out = LeftOut(**own["left_out"])
    if part == "train":
        return Text(examples, own["facts"], left_out)
    rows = rows_of_json(read_json(folder / f"{part}-rows.json")["rows"])
    kept = from_tensors(read_tensors(folder / f"{part}-rows.safetensors"), rows)
    return Text(examples, own["facts"], left_out, kept)
