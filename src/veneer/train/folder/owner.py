"""Names the run that a checkpoint belongs to, and refuses the checkpoints of others."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer import settings
from veneer.errors import FormatError
from veneer.files import read_json
from veneer.train.folder.layout import CONFIG
from veneer.train.run import Run

ID, EARLIER = "id", "earlier"  # entries of config.json
# Settings that change nothing in what is computed: they may differ when a run goes on.
FREE = ("out", "resume", "allow", "keep", "save_every", "report", "track", "shard", "stream_base")
Owner = dict[str, str]


def named(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a new run's config.json with a name of its own."""
    return {**config, ID: uuid.uuid4().hex}


def renewed(config: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json of a run that goes on with other settings; it keeps its name and checkpoints."""
    if ID not in before:
        return dict(config)
    return {**config, ID: before[ID], EARLIER: known(before)}


def known(config: Mapping[str, Any]) -> list[Owner]:
    """Returns the owners whose checkpoints a run goes on from, the present one first; none of an old run."""
    if ID not in config:
        return []
    parts = {"settings": _chosen(config["run"]), "base": config["base"], "data": config["data"]}
    own = {ID: config[ID], **{name: _hash(part) for name, part in parts.items()}}
    return [own, *config.get(EARLIER, [])]


def read(folder: Path) -> list[Owner]:
    """Returns `known` of the run in a folder, none if it has no config.json. Raises FormatError."""
    if not (folder / CONFIG).exists():
        return []
    return known(read_json(folder / CONFIG, ("run", "data", "base")))


def check(path: Path, meta: Mapping[str, Any], owners: list[Owner]) -> None:
    """Raises FormatError if the checkpoint with this meta.json belongs to none of the owners."""
    there = meta.get("owner")
    if there in owners or (there is None and not owners):
        return
    here = owners[0] if owners else {}
    odd = [name for name in (ID, "settings", "base", "data") if (there or {}).get(name) != here.get(name)]
    shown = " and ".join("id of the run" if name == ID else name for name in odd)
    raise FormatError(
        f"{path} belongs to another run than the {CONFIG} beside it: they differ in {shown};"
        " move the checkpoint away, or restore the run's folder from a copy"
    )


def _chosen(run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that are not at their defaults: a later version may have more."""
    defaults = {
        n: _json(s.default) for n, s in settings.table(Run).items() if s.default is not settings.REQUIRED
    }
    return {k: v for k, v in run.items() if k not in FREE and _json(v) != defaults.get(k)}


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=True, default=list)


def _hash(content: Any) -> str:
    return hashlib.sha256(_json(content).encode()).hexdigest()
