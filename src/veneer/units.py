"""Bytes, counts and seconds as people read them."""

from __future__ import annotations

PREFIXES = ("", "k", "M", "G", "T")


def size(n: float) -> str:
    """Returns bytes with three significant digits and decimal units: "12 bytes", "638 kB", "1.2 GB"."""
    digits, prefix = _scaled(n)
    return f"{digits} {prefix}B" if prefix else f"{digits} bytes"


def count(n: float) -> str:
    """Returns a count with three significant digits: "999", "1.2 k", "3.4 M"."""
    digits, prefix = _scaled(n)
    return f"{digits} {prefix}".rstrip()


def duration(seconds: float) -> str:
    """Returns "0.25 s", "12.3 s", "4 min 5 s" or "2 h 10 min"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _scaled(n: float) -> tuple[str, str]:
    """Returns three significant digits and the prefix of the unit in which they are below 1000."""
    for prefix in PREFIXES:
        if float(f"{n:.3g}") < 1000 or prefix == PREFIXES[-1]:
            break
        n /= 1000
    return f"{n:.3g}" if n < 999.5 else f"{n:,.0f}", prefix
