"""The settings of a server, declared once for Python, the command line and the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from veneer.errors import ConfigError, suggest
from veneer.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Memory, time and sizes of a server."""

    PANEL = "Speed and memory"

    slots: int = setting(64, "adapters in the bank at once; others wait on the disk or in RAM")
    running: int = setting(64, "requests in one batch")
    queue: int = setting(256, "requests that may wait; more are answered with 429")
    step_tokens: int = setting(512, "tokens of one step: longer prompts are read in chunks")
    cache_tokens: int = setting(65536, "tokens of keys and values that running requests may need together")
    context: int | None = setting(
        None, "longest prompt with its answer; the model's own limit unless given", unit="tokens"
    )
    max_tokens: int = setting(512, "longest answer where a chat request names no limit", unit="tokens")
    prefix_cache: int = setting(256, "prompt beginnings kept for reuse; 0 for none", unit="MiB")
    adapter_memory: int = setting(2048, "adapters kept in RAM beside those in the bank", unit="MiB")
    adapter_size: int = setting(4096, "largest file of an adapter", unit="MiB")
    max_rank: int = setting(512, "largest rank of an adapter")
    patience: float = setting(
        5.0, "time after which a request that was passed over comes first", unit="seconds"
    )
    watch: float = setting(
        2.0, "time between two looks for new and changed adapters; 0 for none", unit="seconds"
    )
    engine: Literal["auto", "packed", "static"] = setting(
        "auto", "packed: continuous batching; static: padded batches; auto: packed where it is exact"
    )
    one_pass: bool = setting(
        False,
        "try a kernel for base and adapters at once at the start, on a GPU; batches for which it was faster"
        " use it",
    )

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every option out of its range."""
        for f in fields(Options):
            value, low = getattr(self, f.name), _LEAST.get(f.name, 1)
            if isinstance(value, int | float) and not isinstance(value, bool) and value < low:
                yield f"{f.name} must be at least {low:g}, got {value}"


_LEAST = dict.fromkeys(("prefix_cache", "adapter_memory", "watch", "patience"), 0)


def options_of(given: dict[str, Any]) -> Options:
    """Returns the options. Raises ConfigError with the nearest name for an unknown one."""
    known = [f.name for f in fields(Options)]
    unknown = [f"serve has no option {n!r}{suggest(n, known)}" for n in given if n not in known]
    if unknown:
        raise ConfigError("\n".join(unknown))
    return Options(**given)


def adapters_of(
    given: Mapping[str, str | Path] | str | Path | None,
) -> tuple[Path | None, dict[str, str | Path]]:
    """Returns the root folder, or the adapters by name."""
    if isinstance(given, str | Path):
        if not Path(given).is_dir():
            raise ConfigError(
                f"adapters must be a folder or {{name: folder}}, got {str(given)!r}; make the folder first"
            )
        return Path(given), {}
    return None, dict(given or {})
