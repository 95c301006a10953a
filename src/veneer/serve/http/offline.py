"""Answers a file of requests: OpenAI's batch format, a JSON object a line, in and out."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from pydantic import ValidationError

from veneer import disk, foreign
from veneer.errors import DataError, VeneerError
from veneer.serve.answers import Answer, collect
from veneer.serve.engine.request import Event, Failed, Finished
from veneer.serve.errors import RequestError
from veneer.serve.http import asks, errors
from veneer.serve.http.fields import ChatBody, CompletionBody
from veneer.serve.http.shapes import Shape
from veneer.serve.http.streams import Ask
from veneer.serve.server import Server

URLS: dict[str, Any] = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody}


class Line(NamedTuple):
    """One request of a file."""

    id: str
    url: str
    body: Any


class Done(NamedTuple):
    """Counts of an answered file; kept: answers that were there already."""

    answered: int
    failed: int
    kept: int

    def as_dict(self) -> dict[str, int]:
        """Returns the counts by name."""
        return self._asdict()


def read(path: Path) -> list[Line]:
    """Returns a file's requests. Raises DataError that names every line that cannot be read."""
    lines, problems = [], []
    for number, text in enumerate(_text(path).splitlines(), 1):
        if text.strip():
            try:
                lines.append(_line(text, number))
            except ValueError as e:
                problems.append(f"{path.name}:{number}: {e}")
    ids = [line.id for line in lines]
    problems += [
        f"{path.name}: custom_id {i!r} must be used once" for i in {i for i in ids if ids.count(i) > 1}
    ]
    if problems:
        raise DataError("\n".join(problems))
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} must be UTF-8 text, a JSON object a line") from None


def _line(text: str, number: int) -> Line:
    try:
        content = foreign.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("body", {}), dict):
        raise ValueError(f"a line must be a JSON object, got {text[:40]!r}")
    body = content.get("body", content)
    url = content.get("url") or ("/v1/chat/completions" if "messages" in body else "/v1/completions")
    if url not in URLS:
        raise ValueError(f"url must be one of {', '.join(URLS)}, got {url!r}")
    return Line(str(content.get("custom_id", number)), url, body)


def answer(server: Server, lines: Sequence[Line], out: Path) -> Done:
    """Answers requests, many at a time, and appends a line for each to `out`; keeps the answers it holds."""
    _cut_torn(out)
    there = _there(out)
    wanted = [line for line in lines if line.id not in there]
    failed = 0
    width = max(1, min(server.options.running * 2, server.options.queue))
    with (
        disk.written(out, lambda: out.stat().st_size),
        ThreadPoolExecutor(width, "veneer-batch") as pool,
        out.open("a", encoding="utf-8") as file,
    ):
        for line, (status, body) in zip(
            wanted, pool.map(lambda one: _answer(server, one), wanted), strict=True
        ):
            failed += status != 200
            made = {
                "id": f"batch_req_{uuid.uuid4().hex}",
                "custom_id": line.id,
                "response": {"status_code": status, "body": body},
                "error": None,
            }
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
            file.flush()
    return Done(len(wanted) - failed, failed, len(lines) - len(wanted))


def _cut_torn(out: Path) -> None:
    """Cuts the last line if a kill or a full disk has ended it early: the next one would join it."""
    if out.exists():
        whole = out.read_bytes().rpartition(b"\n")
        os.truncate(out, len(whole[0]) + len(whole[1]))


def _there(out: Path) -> set[str]:
    if not out.exists():
        return set()
    found = set()
    for text in out.read_text(encoding="utf-8").splitlines():
        try:
            line = foreign.loads(text)
            if line["response"]["status_code"] == 200:
                found.add(str(line["custom_id"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _answer(server: Server, line: Line) -> tuple[int, dict[str, Any]]:
    try:
        body = URLS[line.url].model_validate(line.body)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return 400, errors.body(f"{place}: {first['msg']}", code="invalid_request", param=place)
    try:
        return 200, _whole(server, body)
    except RequestError as e:
        return e.status, errors.body_of(e)
    except VeneerError as e:
        return 400, errors.body(str(e), code="invalid_request")


def _whole(server: Server, body: Any) -> dict[str, Any]:
    chat = isinstance(body, ChatBody)
    asked = asks.of_chat(server, body) if chat else asks.of_completion(server, body)
    named = asks.named(server, body)
    answers = list(_answers(server, asked, named, special=not body.skip_special_tokens))
    echo = not chat and body.echo
    echoes = [server.tokenizer.decode(a.prompt, skip_special_tokens=True) if echo else "" for a in asked]
    shape = Shape(chat, body.model or server.name, named, server.tokenizer)
    return shape.whole(answers, echoes, len(asked) // (body.n or 1))


def _answers(server: Server, asked: list[Ask], named: Any, *, special: bool) -> Iterator[Answer]:
    queues: list[SimpleQueue[Event]] = [SimpleQueue() for _ in asked]
    for ask, queue in zip(asked, queues, strict=True):
        server.submit(ask.prompt, queue.put, ask.sampling, named=named, special=special)
    for queue in queues:
        yield collect(_events(queue))


def _events(queue: SimpleQueue[Event]) -> Iterator[Event]:
    while True:
        event = queue.get()
        yield event
        if isinstance(event, Finished | Failed):
            return
