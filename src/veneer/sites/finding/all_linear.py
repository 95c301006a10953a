"""Chooses the default layers, "all-linear": every Linear and Conv1D but the output head and unfit layers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping

from torch import nn

from veneer.errors import SiteError, first_few
from veneer.sites.finding.kinds import kind_of, layers_of
from veneer.sites.finding.unfit import Unfit


def all_linear(kinds: Mapping[str, str]) -> list[str]:
    """Returns the names of the linear layers. kinds: by name, of the layers outside the output head."""
    return [n for n, kind in kinds.items() if kind in ("linear", "transposed")]


def leave_out(names: list[str], unfit: list[Unfit]) -> list[str]:
    """Returns the names without unfit layers, which one warning counts. Raises SiteError if all are unfit."""
    left_out = {u.name: u for u in unfit}
    if len(left_out) == len(names):
        raise SiteError("\n".join(u.text for u in left_out.values()))
    if left_out:
        counts = Counter(u.why for u in left_out.values())
        why = ", ".join(f"{n} {reason}" for reason, n in counts.items())
        warnings.warn(
            f"all-linear leaves out {len(left_out)} of {len(names)} linear layers ({why}):"
            f" {first_few(left_out, 3)}",
            stacklevel=3,
        )
    return [n for n in names if n not in left_out]


def bare_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns stacks of matrices (n, .., ..) that no layer holds, such as fused experts, by name."""
    own: dict[str, nn.Parameter] = {}
    for name, module in layers_of(model).items():
        if kind_of(module) is None:
            parameters = module.named_parameters(prefix=name, recurse=False)
            own |= {n: p for n, p in parameters if p.ndim == 3 and min(p.shape) > 1}
    return own
