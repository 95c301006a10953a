"""Groups tensors by module and role, by the endings of their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from veneer.convert.leftovers import Leftovers
from veneer.errors import FormatError, first_few, option

Roles = dict[str, Tensor]
NEEDED = ("A", "B")
# LyCORIS's other methods by the last parts of their tensors' names.
OTHERS = {
    "LoHa": r"hada_(w\d_[ab]|t\d)",
    "LoKr": r"lokr_(w\d(_[ab])?|t\d)",
    "OFT or BOFT": r"oft_(blocks|diag)",
    "(IA)3": r"on_input",
    "full fine-tuning": r"diff(_b)?",
    "norm layers": r"[wb]_norm",
}
MERGE = "merge them there, and take the difference with veneer.extract"
WAYS = dict.fromkeys(("LoHa", "LoKr"), f"use {option('to', 'peft')} for a file of them alone, or {MERGE}")
WAYS |= {"OFT or BOFT": f"use {option('to', 'veneer')} for a file of OFT alone, or {MERGE}"}
LYCORIS = "|".join(OTHERS[method] for method in ("LoHa", "LoKr"))


def by_module(
    tensors: Mapping[str, Tensor],
    endings: Mapping[str, str],
    rest: Leftovers,
    needed: tuple[str, ...] = NEEDED,
) -> dict[str, Roles]:
    """Returns {module: {role: tensor}} by `endings` {end of the name: role}; other tensors go to `rest`.

    Raises FormatError with the modules that lack one of the roles `needed`.
    """
    found: dict[str, Roles] = {}
    others = _others(tensors)
    for name, tensor in tensors.items():
        end = next((e for e in endings if name.endswith(e)), None)
        module = name.removesuffix(end) if end else next((m for m in others if name.startswith(f"{m}.")), "")
        if module in others and (end is None or endings[end] not in needed):
            why = f"tensors of {others[module]} (LyCORIS), which are not pairs of factors"
            rest.add(name, f"{why}; {WAYS.get(others[module], MERGE)}")
        elif end is None:
            rest.add(name, "tensors other than factors of plain LoRA")
        else:
            found.setdefault(module, {})[endings[end]] = tensor
    if not found and rest.refused:
        rest.settle("the file")
    half = [
        f"{m} lacks {' and '.join(r for r in needed if r not in roles)}"
        for m, roles in found.items()
        if not set(needed) <= set(roles)
    ]
    if half:
        raise FormatError(f"incomplete factors: {first_few(half)}")
    return found


def _others(tensors: Iterable[str]) -> dict[str, str]:
    """Returns {module: method} of the modules that hold tensors of another method of LyCORIS."""
    found = {}
    for name in tensors:
        for method, ends in OTHERS.items():
            if hit := re.fullmatch(rf"(.+?)\.(?:{ends})", name):
                found[hit[1]] = method
    return found
