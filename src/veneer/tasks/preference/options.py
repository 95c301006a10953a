"""Checks of the numbers that objectives on preferences take."""

from __future__ import annotations

from veneer.errors import ConfigError


def check_above(**given: float) -> None:
    """Raises one ConfigError for all numbers that are not above 0."""
    wrong = [f"{name} must be above 0, got {value:g}" for name, value in given.items() if not value > 0]
    if wrong:
        raise ConfigError("\n".join(wrong))
