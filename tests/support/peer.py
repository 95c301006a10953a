"""One method in Veneer and in PEFT from the same numbers: outputs, gradients, and files both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from support import models
from torch import nn

import veneer
from veneer.adapt.attached import changes

IDS = torch.randint(0, models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
TOLERANCE = 5e-5  # float32 through two layers and back
# Our parameter -> PEFT's of the same layer; a vector is a column or a row there.
NAMES = {
    "c": "fourierft_spectrum",
    "l": "ia3_l",
    "D": "miss_block",
    "B": "miss_block",
    "b": "vera_lambda_b",
    "d": "vera_lambda_d",
}
TURNED = ("D",)  # (out, r) here, (r, out) there


def agrees_with_peft(
    folder: Path,
    method: str,
    options: dict[str, Any],
    to: list[str],
    config: Any,
    build: Callable[[], nn.Module] = models.llama,
    same_numbers: bool = True,
    names: Mapping[str, str] | None = None,
) -> nn.Module:
    """Asserts that a change made by PEFT and read here, and one made here and read by PEFT, are the same in
    both.

    same_numbers: True if both train the same numbers when PEFT reads ours, and not multiples of them.
    names: our parameters by PEFT's names of the same numbers, if NAMES does not have them.
    Returns the model that Veneer read PEFT's folder into.
    """
    import peft

    theirs = peft.get_peft_model(build(), config)
    _shake(theirs, [p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(folder / "theirs")
    ours = veneer.load(build(), folder / "theirs", trainable=True)
    _same(ours, theirs, names=names)
    made = veneer.attach(build(), method, to=to, **options)
    models.randomise(made)
    veneer.save(made, folder / "ours")
    assert (folder / "ours" / "adapter_model.safetensors").is_file(), "not in PEFT's layout"
    opened = peft.PeftModel.from_pretrained(build(), folder / "ours", is_trainable=True)
    _same(made, opened, gradients=same_numbers, names=names)
    again = veneer.load(build(), folder / "ours")
    torch.testing.assert_close(models.output(again), models.output(made), rtol=1e-5, atol=1e-6)
    return ours


def _shake(model: nn.Module, trained: list[nn.Parameter]) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn(p.shape, generator=draw))


def _same(
    ours: nn.Module, theirs: nn.Module, gradients: bool = True, names: Mapping[str, str] | None = None
) -> None:
    outputs = []
    for model in (ours, theirs):
        model.zero_grad()
        y = _logits(model)
        (y.square().mean()).backward()
        outputs.append(y.detach())
    with veneer.using(ours):
        moved = _apart(_logits(ours).detach(), outputs[0])
    assert moved > 1e-3, "the adapter changes nothing"
    assert _apart(*outputs) <= TOLERANCE, "outputs"
    if gradients:
        _same_gradients(ours, theirs, names or NAMES)


def _logits(model: nn.Module) -> torch.Tensor:
    inner = getattr(getattr(model, "base_model", None), "model", model)
    if isinstance(inner, models.ConvNet):
        y: torch.Tensor = model(**models.inputs(inner))
        return y
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def _same_gradients(ours: nn.Module, theirs: nn.Module, names: Mapping[str, str]) -> None:
    """Asserts equal gradients for every parameter of every layer, and the same set of parameters."""
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for site, delta in changes(ours, "default"):
        for name, p in delta.named_parameters():
            theirs_of, _, end = names[name].partition(
                ".*"
            )  # "oft_R.*.weight": the adapter's name stands inside
            own, expected = p.grad, wanted.pop(f"base_model.model.{site.name}.{theirs_of}.default{end}")
            assert own is not None, f"no gradient for {name} of {site.name}"
            expected = expected.mT if name in TURNED else expected
            error = _apart(own, expected.reshape(own.shape))
            assert error <= TOLERANCE, (site.name, name, error)
    assert not wanted, f"only PEFT trains {list(wanted)}"


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference over that of b."""
    return float((a - b).norm() / b.norm())
