"""`veneer study`: claims about learning and forgetting, judged on the built-in model or on SmolLM2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.search.study.study import study

__all__ = ["study", "text"]


def text(found: Mapping[str, Any]) -> str:
    """Returns the verdicts for people."""
    lines = [f"{c['text']:<7} {c['outcome']:<16} {c['claim']} ({c['source']})" for c in found["claims"]]
    if found["missing"]:
        lines.append(f"parts still to run: {', '.join(found['missing'])}")
    return "\n".join([*lines, f"page: {found['page']}"])
