"""One method on one layer: attached, moved from its start, its gradient checked."""

from __future__ import annotations

import torch

import veneer
import veneer.methods
from veneer.adapt.attached import changes
from veneer.sites import site_for


def fitted(row, layer):
    """The row with options that fit the layer."""
    return row if row.fit is None else row._replace(options=row.fit(row.options, site_for("0", layer)))


def attach(model, row, x):
    """Adapts the one layer, after a look at a loss on x where the start needs one."""
    options = {n: v for n, v in row.options.items() if " " not in n}  # others are for the oracle alone
    if row.calibrated:
        options["stats"] = veneer.calibrate(
            model, [x], rank=options["rank"], loss=lambda m, x: m(x).square().sum(), to=["0"]
        )
    veneer.attach(model, row.name, to=["0"], **options)


def shake(model, name="default", size=0.3):
    """Moves every trained number, so that nothing is at its start."""
    with torch.no_grad():
        for _, delta in changes(model, name):
            for p in delta.parameters():
                p.add_(size * torch.randn_like(p))


def numpy_tensors(delta):
    return {n: t.detach().numpy() for n, t in delta.state_dict().items()}


def check_gradient(model, x):
    parameters = {n: p for n, p in model.named_parameters() if "deltas" in n}

    def output(*values):
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(
        output, tuple(p.detach().clone().requires_grad_() for p in parameters.values()), fast_mode=True
    )


def built(method, layer, options):
    """The site, and a change with trained numbers."""
    torch.manual_seed(0)
    site = site_for("layer", layer)
    delta = veneer.methods.build(veneer.methods.get(method), site, options)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return site, delta
