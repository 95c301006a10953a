"""`veneer rank`: the rank that a task needs, with its curve and the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.search.rank.rank import SETTINGS, rank
from veneer.tasks import Metric

__all__ = ["rank", "text"]


def text(found: Mapping[str, Any]) -> str:
    """Returns the curve, the rank and its reason for people."""
    metric = Metric(**found["metric"]) if "metric" in found else Metric("score")
    lines = [f"{'rank':>6}  {metric.words}"]
    for rank_, entry in sorted(found["curve"].items(), key=lambda item: int(item[0])):
        lines.append(f"{rank_:>6}  {_words(entry, metric)}")
    for name, entry in found.get("table", {}).items():
        lines.append(f"{name:>14}  {_words(entry, metric)}")
    lines += ["", f"rank {found['rank']}: {found['reason']}"]
    lines += [found["layers"]] if found.get("layers") else []
    if "capacity_floor" in found:
        lines.append(
            f"capacity asks for rank {found['capacity_floor']} or more (a bit a label, two a parameter)"
        )
    if "cost_ratio" in found:
        time, work = found["cost_ratio"], found.get("work_ratio")
        counted = "" if work is None else f", and {work:.2f} times its work in tokens"
        lines.append(f"the search took {time:.2f} times as long as its one training{counted}")
    if found["rank"] is None:
        return "\n".join(lines)
    return "\n".join([*lines, f"next: veneer fit --config {found['folder']}/{SETTINGS} --data .."])


def _words(entry: Mapping[str, Any] | None, metric: Metric) -> str:
    if entry is None:
        return "diverged"
    mean = entry["mean"] if "mean" in entry else metric.cost(entry["cost"])
    if entry["low"] is None:
        return f"{mean:.4f}"
    if "shortfall" in entry:
        spread = f"{entry['low']:+.4f} to {entry['high']:+.4f}"
        return f"{mean:.4f}  ({entry['shortfall']:+.4f} from the pilot, {spread})"
    return f"{mean:.4f}  ({entry['low']:.4f} to {entry['high']:.4f})"
