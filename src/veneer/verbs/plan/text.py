"""Writes a plan for people: tables of layers, memory and time, everything with its unit."""

from __future__ import annotations

from collections.abc import Mapping

from veneer.units import duration, size
from veneer.verbs.plan.layers import kinds
from veneer.verbs.plan.result import Plan

PARTS: Mapping[str, str] = {
    "weights": "weights of the base",
    "adapter": "adapter and its buffers",
    "gradients": "gradients",
    "optimiser": "optimiser state",
    "activations": "kept for the backward",
    "logits": "logits and their gradient",
    "peak": "peak",
}

PRODUCTS: Mapping[str, str] = {
    "forward": "forward",
    "inputs": "gradients of inputs",
    "weights": "gradients of weights",
    "attention": "attention",
    "adapter": "adapter",
}


def text(found: Plan) -> str:
    """Returns the plan for people."""
    parts = (_of_layers, _of_memory, _of_time, _of_halving)
    return "\n\n".join("\n".join(part(found)) for part in parts)


def _of_layers(p: Plan) -> list[str]:
    lines = [f"{'layers':<44} {'shape':>13} {'rank':>5} {'trained numbers':>15} {'of W':>7}"]
    for kind in kinds(p.layers):
        one, name = kind.layer, f"{kind.n_layers} x {kind.name}"
        shape, rank = f"{one.out} x {one.in_}", "-" if one.rank is None else one.rank
        lines.append(f"{name[-44:]:<44} {shape:>13} {rank:>5} {kind.trained:>15,} {one.share:>7.2%}")
    return [*lines, f"{p.run.method} trains {p.trained:,} numbers, {p.share:.2%} of the base's {p.base:,}"]


def _of_memory(p: Plan) -> list[str]:
    method, alone = p.run.method, p.run.trains_base
    columns = {method: p.memory} if alone else {method: p.memory, "full fine-tuning": p.full}
    lines = [f"{'memory':<28}" + "".join(f"{name:>18}" for name in columns)]
    lines += [
        f"{name:<28}" + "".join(f"{size(getattr(m, part)):>18}" for m in columns.values())
        for part, name in PARTS.items()
    ]
    source = "measured" if p.measured else "estimated from shapes"
    lines.append(f"{method}: {source}{'' if alone else '; full fine-tuning: estimated from shapes'}")
    if p.measured and p.measured.growth is not None:
        grown = f"the process grew by {size(p.measured.growth)} over the loaded model"
        lines.append(f"{grown}, libraries and free memory included")
    if p.run.stream_base:
        lines.append("--stream-base: the blocks of the base stay on disk, and one is in memory at a time")
    room = "unknown" if p.available is None else size(p.available)
    return [*lines, f"available on {p.run.device}: {room}", p.problem or "fits"]


def _of_time(p: Plan) -> list[str]:
    shares = {name: getattr(p.flops, part) / 1e9 for part, name in PRODUCTS.items()}
    parts = ", ".join(f"{name} {n:,.2f}" for name, n in shares.items() if n)
    own, full = p.flops.total / 1e9, p.full_flops.total / 1e9
    n = p.length
    lines = [
        f"10^9 operations a step: {own:,.2f} ({parts}); full fine-tuning {full:,.2f}",
        f"{n.steps:,} steps, {n.tokens:,} tokens, {n.evaluations:,} evaluations",
    ]
    if p.cache_frozen is not None:
        frozen = f"--cache-frozen: {size(p.cache_frozen)} on disk"
        lines.append(f"{frozen}; steps are counted and measured here with all blocks computed")
    if p.measured is None or p.seconds is None:
        return [*lines, "seconds: not measured (no probe)"]
    speed = f"{p.measured.seconds:.3g} s a step ({n.tokens / n.steps / p.measured.seconds:,.0f} tokens/s)"
    return [*lines, f"{speed}: {duration(p.seconds)} in all, evaluations included"]


def _of_halving(p: Plan) -> list[str]:
    if not p.halving:
        return ["no setting can be halved any more"]
    best, now = p.halving[0], p.memory.peak
    verb = "halves the memory" if best.halves else "saves most, but less than half:"
    first = f"one setting: {best.change} {verb} {size(now)} -> {size(best.share * now)} (estimated)"
    return [first, *(f"  {t.change}: {t.share:.0%}" for t in p.halving[1:])]
