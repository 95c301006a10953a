"""ReLoRA: a low-rank change that is written into the base and begun anew, again and again.  Lialin et al.
2023, https://arxiv.org/abs/2307.05695

Every `period` steps  W <- W + s B A,  A is drawn again,  B = 0,  most of the moments of A and B are
forgotten, and the rate rises again over `rewarm` steps: the sum of many changes of rank r has any rank. The
paper begins with some steps at full rank. After a restart A is not zero, so that B learns from the next step
on; the sum is made in float32, and a base in fewer bits is refused, where most of a small change would be
lost.

State: as LoRA. Cost: LoRA's, and a product B A of every weight a period.
When: to train from nothing with moments for the factors alone, after a start at full rank.
Known against it: at 60 to 350 M parameters behind full rank and behind GaLore in GaLore's own table; it needs
the start at full rank, whose moments it was to save.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from veneer.adapt.attached import changes
from veneer.errors import ConfigError, first_few
from veneer.methods import build
from veneer.methods.lora import LoRA

MOMENTS = ("exp_avg", "exp_avg_sq")


def check(model: nn.Module, adapter: str) -> None:
    """Raises ConfigError, naming layers, for changes that cannot be begun anew and bases that would lose
    them."""
    found = changes(model, adapter)
    other = [site.name for site, delta in found if not isinstance(delta, LoRA) or delta.A0 is not None]
    narrow = [site.name for site, _ in found if site.dtype not in (torch.float32, torch.float64)]
    problems = []
    if other:
        problems.append(
            f"ReLoRA restarts plain LoRA whose B starts at zero, unlike {first_few(other)}; use method lora,"
            " init kaiming"
        )
    if narrow:
        problems.append(
            f"ReLoRA adds small changes to the base, and {first_few(narrow)} would round them away; keep it"
            " in float32"
        )
    if problems:
        raise ConfigError("\n".join(problems))


@torch.no_grad()
def restart(
    model: nn.Module,
    adapter: str,
    optimisers: Iterable[torch.optim.Optimizer],
    cycle: int,
    *,
    prune: float = 0.9,
) -> None:
    """Writes the adapter's changes into the base and begins them anew, with a draw of A for this cycle.

    The model computes what it did, up to rounding. prune: the share of the moments that is forgotten.
    """
    trained: list[nn.Parameter] = []
    for site, delta in changes(model, adapter):
        assert isinstance(delta, LoRA)
        site.set_weight(site.weight() + delta.delta(site))
        fresh = build(LoRA, site, {**delta.options, "seed": delta.options["seed"] + cycle})
        delta.load_state_dict(fresh.state_dict())
        trained += delta.parameters()
    for optimiser in optimisers:
        for p in trained:
            forget(optimiser.state.get(p, {}), prune)


def forget(state: dict[str, Tensor], share: float) -> None:
    """Zeroes that share of Adam's moments: both where the mean is smallest, as a mean without its square
    would be a leap."""
    mean = state.get(MOMENTS[0])
    n = 0 if mean is None else round(share * mean.numel())
    if mean is None or n == 0:
        return
    small = mean.abs() <= mean.abs().flatten().kthvalue(n).values
    for name in MOMENTS:
        state[name].masked_fill_(small, 0)


def jagged(step: int, first: int, period: int, rewarm: int) -> float:
    """The share of the rate at `step` after restarts at `first`, `first` + `period`, ..: a straight rise
    over `rewarm` steps."""
    return 1.0 if step < first else min(1.0, ((step - first) % period + 1) / (rewarm + 1))
