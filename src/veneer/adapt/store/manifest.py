"""Writes and checks veneer.json: method, options, base and expected effect of an adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.adapt.attached import Changes
from veneer.adapt.peft.targets import Config
from veneer.adapt.store.sizes import Size
from veneer.errors import FormatError
from veneer.files import read_json
from veneer.methods import Delta
from veneer.methods.base.biased import Biased
from veneer.methods.base.token_rows import TokenRows
from veneer.methods.full import Full
from veneer.version import __version__

NAME, FORMAT = "veneer.json", 1
PEFT, NATIVE = "peft", "native"
REQUIRED = ("layout", "method", "options", "sites", "base", "tensors", "probe", "allow")
INSIDE = {
    "base": ("sha256", "tensors"),
    "tensors": ("sha256",),
    "probe": ("inputs", "shape", "where", "off", "on", "dtype"),
}


def method_of(delta: Delta) -> str:
    """Returns the name of the delta's method: its file's."""
    method = delta.inner if isinstance(delta, Biased) else delta
    return type(method).__module__.rpartition(".")[2]


def describe(
    changes: Changes, sizes: Mapping[str, Size], own: Mapping[str, Config], config: Config | None
) -> dict[str, Any]:
    """Returns the manifest's entries that follow from the deltas.

    own: by site, settings beside the tensors. config: PEFT's settings by site, if PEFT can express the
    adapter.
    """

    main = next((d for _, d in changes if not isinstance(d, Full | TokenRows)), changes[0][1])
    sites: dict[str, dict[str, Any]] = {}
    for site, delta in changes:
        size, f = sizes[site.name], delta.factors(site)
        settings = {} if config is None or isinstance(delta, Full) else config[site.name]
        shared = main.options if type(delta) is type(main) else {}
        sites[site.name] = {
            "method": method_of(delta),
            "kind": site.kind,
            "norm": _number(size.change),
            "base_norm": _number(size.base),
            "options": {k: v for k, v in delta.options.items() if k not in shared or shared[k] != v},
            "own": dict(own.get(site.name, {})),
            **({} if f is None else {"rank": f.A.shape[0]}),
            **({"scaling": _scaling(settings)} if settings.get("peft_type") == "LORA" else {}),
        }
    return {
        "format": FORMAT,
        "veneer": __version__,
        "layout": NATIVE if config is None else PEFT,
        "method": method_of(main),
        "options": dict(main.options),
        "seed": main.options.get("seed"),
        "sites": sites,
    }


def _holds(entry: Any, inner: tuple[str, ...]) -> bool:
    return isinstance(entry, dict) and all(k in entry for k in inner)


def site_options(manifest: Mapping[str, Any], site: str) -> dict[str, Any]:
    """Returns the options of one site's delta."""
    entry = manifest["sites"][site]
    return {**(manifest["options"] if entry["method"] == manifest["method"] else {}), **entry["options"]}


def _scaling(config: Mapping[str, Any]) -> float:
    r = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r))


def _number(value: float) -> float | None:
    """Returns None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


def record_of(folder: Path) -> dict[str, Any] | None:
    """Returns the folder's manifest, or None if another program wrote it.

    Raises FormatError for a manifest of another format, or a damaged one.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    found = read_json(path)
    version = found.get("format")
    if version != FORMAT:
        raise FormatError(
            f"{path} has format {version!r}, not {FORMAT}; read it with Veneer {found.get('veneer')}, "
            "which wrote it"
        )
    missing = [k for k in REQUIRED if k not in found]
    if missing:
        raise FormatError(
            f"{path} lacks {', '.join(missing)}; restore it from a copy, or remove it to read the folder "
            "as PEFT's own"
        )
    damaged = [k for k, inner in INSIDE.items() if found[k] is not None and not _holds(found[k], inner)]
    if found["base"] is None or found["tensors"] is None or not isinstance(found["sites"], dict):
        damaged += [k for k in ("base", "tensors", "sites") if k not in damaged]
    if found["probe"] is None and not found.get("no_probe"):
        damaged.append("probe")
    if damaged:
        at = ", ".join(damaged)
        raise FormatError(
            f"{path} is damaged at {at}; restore it from a copy, or remove it to read the folder as PEFT's "
            "own"
        )
    return found
