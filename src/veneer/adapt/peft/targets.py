"""Applies PEFT's rules of names: which layers its settings target, and with which rank and alpha."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Config = dict[str, Any]

# Settings that may be another one by layer, and where those stand.
PATTERNS = {
    "r": "rank_pattern",
    "lora_alpha": "alpha_pattern",
    "alpha": "alpha_pattern",
    "n_frequency": "n_frequency_pattern",
}


def at(config: Mapping[str, Any], name: str) -> Config:
    """Returns one layer's settings; the first pattern that ends its name gives rank and alpha."""
    found = dict(config)
    for key, pattern in PATTERNS.items():
        hit = next(
            (v for k, v in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({k})$", name)), None
        )
        if hit is not None and key in config:
            found[key] = hit
    return {k: v for k, v in found.items() if k not in PATTERNS.values()}


def wrapped(config: Config, names: Iterable[str]) -> set[str]:
    """Returns the modules that PEFT keeps whole: names that end with an entry of modules_to_save."""
    entries = tuple(config.get("modules_to_save") or ())
    return {n for n in names if n.endswith(entries)}


def targeted(config: Config, name: str) -> bool:
    """Returns True if PEFT adapts the layer called `name`."""
    exclude, targets = config.get("exclude_modules"), config["target_modules"]
    if re.fullmatch(exclude, name) if isinstance(exclude, str) else ends(name, exclude or ()):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.get("modules_to_save") or ()):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or (ends(name, targets) and _in_layers(config, name))


def _in_layers(config: Config, name: str) -> bool:
    """Returns True if the number of the layer's block is among layers_to_transform."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        lead = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        found = re.match(rf"{lead}{pattern}\.(\d+)\.", name)
        if found:
            return int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def expressions(config: Mapping[str, Any]) -> list[str]:
    """Returns the regular expressions that the settings are matched by."""
    plain = [v for key in ("target_modules", "exclude_modules") if isinstance(v := config.get(key), str)]
    patterns = [k for key in set(PATTERNS.values()) for k in config.get(key) or ()]
    kept = [rf"(^|.*\.){m}($|\..*)" for m in config.get("modules_to_save") or ()]
    layers = config.get("layers_pattern") or []
    layers = [layers] if isinstance(layers, str) else layers
    return [*plain, *(rf"(.*\.)?({k})$" for k in patterns), *kept, *(rf".*?\.{p}\.(\d+)\." for p in layers)]


def ends(name: str, entries: Iterable[str]) -> bool:
    """Returns True if the name equals an entry, or ends with one after a dot."""
    return any(name == e or name.endswith(f".{e}") for e in entries)
