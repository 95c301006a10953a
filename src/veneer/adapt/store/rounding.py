"""Rounds adapters to a narrower number format, unless that loses them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from veneer.adapt.attached import Changes
from veneer.adapt.store.sizes import dense
from veneer.errors import ConfigError, FormatError, first_few
from veneer.methods import Delta, PeftStored
from veneer.sites import Site

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_LOST = 0.05  # of a change's norm


@torch.no_grad()
def as_saved(changes: Changes, dtype: torch.dtype, in_peft: bool) -> Changes:
    """Returns the deltas as read back from tensors in `dtype`; whole modules in PEFT's layout are unchanged.

    Raises ConfigError for a dtype other than float32, bfloat16 and float16, FormatError if it would lose much
    of a change.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"adapters are saved in {', '.join(map(str, DTYPES))}, not in {dtype}")
    saved, lost = [], {}
    for site, delta in changes:
        narrow = _through_peft(site, delta, dtype) if in_peft else _through_state(delta, dtype)
        saved.append((site, narrow))
        before, after = dense(site, delta), dense(site, narrow)
        if before is not None and after is not None and bool(before.any()):
            lost[site.name] = float((after - before).norm() / before.norm())
    worst = sorted((n for n, share in lost.items() if not share <= MOST_LOST), key=lambda n: -lost[n])
    if worst:
        some = first_few(f"{n} ({lost[n]:.0%})" for n in worst)
        raise FormatError(
            f"in {dtype} these changes would lose more than {MOST_LOST:.0%} of themselves: {some}; save in "
            "float32"
        )
    return saved


def _through_peft(site: Site, delta: Delta, dtype: torch.dtype) -> Delta:
    if not isinstance(delta, PeftStored):
        return delta
    form = delta.to_peft(site)
    assert form is not None  # the whole adapter is in PEFT's format
    return type(delta).from_peft(
        site, form.config, {k: rounded(t, dtype) for k, t in {**form.shared, **form.tensors}.items()}
    )


def _through_state(delta: Delta, dtype: torch.dtype) -> Delta:
    twin = copy.deepcopy(delta)
    for t in twin.state_dict().values():
        t.copy_(rounded(t, dtype))
    return twin


def rounded(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns t in dtype; unchanged if dtype is None or t holds indices."""
    return t if dtype is None or not t.is_floating_point() else t.to(dtype)
