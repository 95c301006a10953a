"""VADER's rated sentences: one JSON-lines file per source, with the mean of the ratings."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

SOURCES = {"movieReview": "films", "amazonReview": "amazon", "nytEditorial": "editorials", "tweets": "tweets"}


def convert(unpacked: Path, out: Path) -> None:
    """Writes `id`, `document`, `rating` (-4 to 4) and `text` of every sentence.

    Ids such as 12_3 share the document 12: a split has to keep them together.
    """
    out.mkdir(parents=True, exist_ok=True)
    (archive,) = unpacked.rglob("hutto_ICWSM_2014.tar.gz")
    with tarfile.open(archive) as t:
        for member in t:
            source = next(
                (own for name, own in SOURCES.items() if Path(member.name).name.startswith(name)), None
            )
            if (
                source
                and member.name.endswith("GroundTruth.txt")
                and not Path(member.name).name.startswith("._")
            ):
                content = t.extractfile(member).read().decode("utf-8", "replace")  # type: ignore[union-attr]
                (out / f"{source}.jsonl").write_text(_lines(content), encoding="utf-8")


def _lines(content: str) -> str:
    rows = []
    for line in io.StringIO(content):
        name, rating, text = line.rstrip("\n").split("\t")[:3]
        row = {"id": name, "document": name.partition("_")[0], "rating": float(rating), "text": text.strip()}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(rows)
