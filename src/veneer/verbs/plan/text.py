"""What a plan says to people: tables of layers, memory and time, everything with its unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from veneer.runs.prepare import FULL
from veneer.units import duration, size

if TYPE_CHECKING:
    from veneer.verbs.plan.plan import Plan


PARTS: Mapping[str, str] = {
    "weights": "weights of the base",
    "adapter": "adapter, and what it keeps",
    "gradients": "gradients",
    "optimiser": "optimiser state",
    "activations": "kept for the backward",
    "logits": "logits and their gradient",
    "peak": "at most at once",
}

PRODUCTS: Mapping[str, str] = {
    "forward": "forward",
    "inputs": "gradients of inputs",
    "weights": "gradients of weights",
    "attention": "attention",
    "adapter": "adapter",
}


def text(found: Plan) -> str:
    """The plan for people."""
    return "\n".join(
        [*_of_layers(found), "", *_of_memory(found), "", *_of_time(found), "", *_of_halving(found)]
    )


def _of_layers(p: Plan) -> list[str]:
    lines = [f"{'layer':<44} {'shape':>13} {'rank':>5} {'trained numbers':>15} {'of W':>7}"]
    for n in p.layers:
        rank = "-" if n.rank is None else n.rank
        lines.append(
            f"{n.site[-44:]:<44} {f'{n.out} x {n.in_}':>13} {rank:>5} {n.trained:>15,} {n.share:>7.2%}"
        )
    return [*lines, f"{p.run.method} trains {p.trained:,} numbers, {p.share:.2%} of the base's {p.base:,}"]


def _of_memory(p: Plan) -> list[str]:
    columns = (
        {p.run.method: p.memory}
        if p.run.method == FULL
        else {p.run.method: p.memory, "full fine-tuning": p.full}
    )
    source = "measured" if p.measured else "estimated from shapes"
    lines = [f"{'memory':<28}" + "".join(f"{name:>18}" for name in columns)]
    lines += [
        f"{what:<28}" + "".join(f"{size(getattr(m, part)):>18}" for m in columns.values())
        for part, what in PARTS.items()
    ]
    lines.append(
        f"{p.run.method}: {source}{'' if p.run.method == FULL else '; full fine-tuning: estimated from shapes'}"
    )
    if p.measured and p.measured.growth is not None:
        lines.append(
            f"the process grew by {size(p.measured.growth)} over the loaded model, what libraries and free pieces take included"
        )
    room = "not known" if p.available is None else size(p.available)
    return [*lines, f"available on {p.run.device}: {room}", p.problem or "fits"]


def _of_time(p: Plan) -> list[str]:
    parts = ", ".join(
        f"{what} {n / 1e9:,.2f}" for part, what in PRODUCTS.items() if (n := getattr(p.flops, part))
    )
    lines = [
        f"10^9 operations a step: {p.flops.total / 1e9:,.2f} ({parts}); full fine-tuning {p.full_flops.total / 1e9:,.2f}"
    ]
    lines.append(
        f"{p.length.steps:,} steps, {p.length.tokens:,} tokens, {p.length.evaluations:,} evaluations"
    )
    if p.cache_frozen is not None:
        lines.append(
            f"cache_frozen: {size(p.cache_frozen)} on disk; steps are counted and measured here with all blocks computed"
        )
    if p.measured is None or p.seconds is None:
        return [*lines, "seconds: not measured (no probe)"]
    speed = p.length.tokens / p.length.steps / p.measured.seconds
    return [
        *lines,
        f"{p.measured.seconds:.3g} s a step ({speed:,.0f} tokens/s): {duration(p.seconds)} in all, evaluations included",
    ]


def _of_halving(p: Plan) -> list[str]:
    if not p.halving:
        return ["no setting is left that could be halved"]
    best = p.halving[0]
    verb = "halves the memory" if best.halves else "does most, which is not half:"
    first = f"one setting: {best.change} {verb} {size(p.memory.peak)} -> {size(best.share * p.memory.peak)} (estimated)"
    return [first, *(f"  {t.change}: {t.share:.0%}" for t in p.halving[1:])]
