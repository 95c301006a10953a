"""Groups tensors by module and role, by the endings of their names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from veneer.convert.leftovers import Leftovers
from veneer.errors import FormatError, first_few

Roles = dict[str, Tensor]
NEEDED = ("A", "B")


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
    for name, tensor in tensors.items():
        end = next((e for e in endings if name.endswith(e)), None)
        if end is None:
            rest.add(name, "tensors other than factors of plain LoRA")
        else:
            found.setdefault(name.removesuffix(end), {})[endings[end]] = tensor
    half = [
        f"{m} lacks {' and '.join(r for r in needed if r not in roles)}"
        for m, roles in found.items()
        if not set(needed) <= set(roles)
    ]
    if half:
        raise FormatError(f"incomplete factors: {first_few(half)}")
    return found
