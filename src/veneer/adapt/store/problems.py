"""Collects everything wrong with an adapter, and the words that let some of it through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from veneer.adapt.attached import Changes
from veneer.adapt.hooks import CLASH, clashing
from veneer.adapt.store.sizes import Size, finite
from veneer.errors import ConfigError, FormatError, first_few, option, suggest
from veneer.methods.full import Full

# Problems that can be let through, by name. Those let through are written into veneer.json.
ALLOW = {
    "base": "another base than the adapter's",
    "unused": "tensors in the file that belong to no layer",
    "zero": "layers whose change is zero or does not act",
    "beside": "weights of the base that were trained beside the adapter and cannot be saved with it",
    "finite": "tensors with NaN or infinity",
    "norm": "changes of another size than veneer.json says",
    "targets": "entries of target_modules that no layer matches",
    "sha256": "a tensors file that was changed since it was saved",
    "probe": "outputs other than those kept in veneer.json",
}


class Problem(NamedTuple):
    """kind: the word of ALLOW that lets it through, or "fit" if nothing does."""

    kind: str
    text: str


def check_allowed(allow: str | Iterable[str]) -> set[str]:
    """Returns the words as a set. Raises ConfigError for an unknown one."""
    words = {allow} if isinstance(allow, str) else set(allow)
    unknown = [
        f"{option('allow', w)} is not known{suggest(w, ALLOW)}" for w in sorted(words) if w not in ALLOW
    ]
    if unknown:
        raise ConfigError("\n".join(unknown))
    return words


def refuse(what: str, problems: Iterable[Problem], allowed: Iterable[str] = ()) -> set[str]:
    """Returns the words of `allowed` that let a problem through.

    Raises FormatError listing all other problems, and the words that would let them through.
    """
    problems = list(problems)
    left = [p for p in problems if p.kind not in allowed]
    if not left:
        return {p.kind for p in problems}
    words = sorted({p.kind for p in left})
    hint = f"\nto go on all the same: {option('allow', tuple(words))}" if set(words) <= set(ALLOW) else ""
    raise FormatError(f"{what}:\n" + "\n".join(f"- {p.text}" for p in left) + hint)


def dead(changes: Changes, sizes: Mapping[str, Size]) -> list[Problem]:
    """Returns a problem if changes are zero; an unchanged whole module counts only if all are zero."""
    zero = [n for n, size in sizes.items() if size.zero]
    low_rank = [site.name for site, delta in changes if site.name in zero and not isinstance(delta, Full)]
    nothing = low_rank or (zero if len(zero) == len(sizes) else [])
    text = (
        f"the change is zero at {len(nothing)} of {len(sizes)} layers, which have learned nothing: "
        f"{first_few(nothing)}"
    )
    return [Problem("zero", text)] if nothing else []


def hollow(changes: Changes) -> list[Problem]:
    """Returns a problem if parameters are empty, as partitioned ones look from one process."""
    wrong = [
        f"{site.name}.{n}" for site, delta in changes for n, p in delta.named_parameters() if not p.numel()
    ]
    text = (
        f"{len(wrong)} parameters are empty: {first_few(wrong)}; gather what ZeRO or FSDP has partitioned "
        "before saving"
    )
    return [Problem("fit", text)] if wrong else []


def not_finite(tensors: Mapping[str, Tensor]) -> list[Problem]:
    """Returns a problem if tensors hold a NaN or an infinity."""
    wrong = finite(tensors)
    return (
        [Problem("finite", f"NaN or infinity in {len(wrong)} of {len(tensors)} tensors: {first_few(wrong)}")]
        if wrong
        else []
    )


def clash(changes: Changes) -> list[Problem]:
    """Returns a problem if another adapter holds some of the layers as sites of another kind."""
    wrong = clashing(site for site, _ in changes)
    return [Problem("fit", CLASH.format(names=first_few(wrong)))] if wrong else []


def resized(sizes: Mapping[str, Size], sites: Mapping[str, Any]) -> list[Problem]:
    """Returns a problem if norms of changes differ from those in veneer.json."""
    wrong = []
    for n, size in sizes.items():
        then = sites[n]["norm"]
        if then is not None and not abs(size.change - then) <= 0.01 * then + size.floor:
            wrong.append(f"{n} ({size.change:.4g}, saved as {then:.4g})")
    text = (
        f"{len(wrong)} changes have another norm than when they were saved: {first_few(wrong)}; were rank "
        "or alpha edited?"
    )
    return [Problem("norm", text)] if wrong else []
