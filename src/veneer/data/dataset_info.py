"""Reads LLaMA-Factory's dataset_info.json: where a data set of a name lies, and what its columns mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from veneer.data.forms.shape import AS_IS, Shape
from veneer.errors import DataError, first_few, suggest
from veneer.files import read_json

NAME = "dataset_info.json"
# LLaMA-Factory's names of columns, and the ones of our forms.
ALPACA = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
}
TALK = {"messages": "conversations", "system": "system", "tools": "tools"}
SPEAKERS = {
    "user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation",
    "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
TAGS = {"role_tag": "from", "content_tag": "value", **SPEAKERS}  # and their defaults
JUDGED = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}  # of tasks on preferences
MEDIA = ("images", "videos", "audios")
KNOWN = (
    "file_name",
    "hf_hub_url",
    "subset",
    "split",
    "folder",
    "num_samples",
    "formatting",
    "columns",
    "tags",
    "ranking",
)


class Listed(NamedTuple):
    """source: a file, a folder, or a name on the hub; n: the number of rows to take, None for all."""

    source: str
    shape: Shape
    n: int | None


def parted(name: str) -> tuple[Path, str] | None:
    """Returns the list's file and the data set's name, for FOLDER:NAME or FOLDER/dataset_info.json:NAME;"
    " else None."""
    head, _, tail = name.rpartition(":")
    path = Path(head) if head.endswith(NAME) else Path(head) / NAME
    return (path, tail) if head and path.is_file() else None


def find(path: Path, name: str, shape: Shape = AS_IS) -> Listed:
    """Returns the list's entry of a data set. shape: of the task, whose own rows may be judged answers.

    Raises DataError for an unknown name and for unsupported entries.
    """
    known = read_json(path)
    if name not in known:
        raise DataError(f"{path}: unknown data set {name!r}{suggest(name, known)}")
    entry, where = known[name], f"{path}: {name}"
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    used = {column for names in shape.forms.values() for column in names}
    judged = [n for n in JUDGED if n in columns and JUDGED[n] not in used]
    judged += ["ranking"] if entry.get("ranking") and "chosen" not in used else []
    if judged:
        raise DataError(f"{where}: {first_few(judged)} hold judged answers; use task 'dpo' or 'kto'")
    if media := [n for n in MEDIA if n in columns]:
        raise DataError(
            f"{where}: {first_few(media)} belong to another task; this one learns from text alone"
        )
    odd = [n for n in entry if n not in KNOWN]
    if odd or not {"file_name", "hf_hub_url"} & {*entry}:
        raise DataError(f"{where}: unsupported entries {first_few(odd) or 'without file_name or hf_hub_url'}")
    found = _shape(where, entry.get("formatting", "alpaca"), columns, tags)
    found = found._replace(forms=shape.forms, media=shape.media)
    return Listed(_source(path, entry), found, entry.get("num_samples"))


def _source(path: Path, entry: Mapping[str, Any]) -> str:
    if "file_name" in entry:
        return str(path.parent / entry["file_name"])
    return ":".join(filter(None, (entry["hf_hub_url"], entry.get("subset"), entry.get("split", "train"))))


def _shape(where: str, formatting: str, columns: Mapping[str, str], tags: Mapping[str, str]) -> Shape:
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise DataError(f"{where}: formatting must be alpaca, sharegpt or openai, got {formatting!r}")
    ours = {**(ALPACA if formatting == "alpaca" else TALK), **JUDGED}
    odd = [n for n in columns if n not in ours] + [n for n in tags if n not in TAGS]
    if odd:
        raise DataError(
            f"{where}: unknown columns or tags {first_few(map(repr, odd))}{suggest(odd[0], [*ours, *TAGS])}"
        )
    named = {ours[theirs]: column for theirs, column in columns.items() if column}
    own = {TAGS[k]: v for k, v in tags.items()} if formatting != "alpaca" else {}
    return Shape(named or ({} if formatting == "alpaca" else {"conversations": "conversations"}), tags=own)
