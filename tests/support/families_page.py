"""Tries an adapter on a small model of every family, and writes the table of docs/models.md.

python tests/support/families_page.py
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from support import families
from torch import nn

import veneer
from veneer.verbs.convert import convert

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = (
    "| family | class | layers | loss falls | merged | saved | other programs | notes |\n"
    "|---|---|---|---|---|---|---|---|"
)
STEPS, CLOSE = 20, 2e-4  # of the largest output, in float32 through a dozen layers


def row(name: str, folder: Path) -> str:
    """Returns the family's row. Raises AssertionError if its adapter does not do what the table says."""
    family = families.FAMILIES[name]
    model, given = families.build(name), families.inputs(name)
    veneer.attach(model, "lora", to=family.to, exclude=family.exclude, rank=4, alpha=8)
    layers = sum(p.requires_grad for p in model.parameters()) // 2
    first, last = trained(model, given, family.trains)
    assert last < 0.985 * first, (first, last)
    y = outputs(model, given)
    merged = copy.deepcopy(model)
    veneer.merge(merged)
    close(outputs(merged, given), y)
    veneer.save(model, folder / "adapter")
    close(outputs(veneer.load(families.build(name), folder / "adapter"), given), y)
    assert differs(outputs(families.build(name), given), y)
    other = peer(name, folder)
    close(outputs(other, given), y)
    program = "diffusers" if family.package == "diffusers" else "PEFT"
    cells = [family.title, f"`{family.model}`", str(layers), "yes", "equal", "equal", f"{program}: equal"]
    return f"| {' | '.join([*cells, family.note])} |"


def trained(model: nn.Module, given: families.Inputs, in_training: bool) -> tuple[float, float]:
    """Trains for 20 steps; returns the first loss and the last."""
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train(in_training)
    losses = []
    for _ in range(STEPS):
        loss = families.loss(model, given)
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses[0], losses[-1]


@torch.no_grad()
def outputs(model: nn.Module, given: families.Inputs) -> torch.Tensor:
    return families.outputs(model, given)


def peer(name: str, folder: Path) -> Any:
    """Returns the base with the saved adapter as PEFT or diffusers open it."""
    base: Any = families.build(name)
    if families.FAMILIES[name].package == "diffusers":
        part = "transformer" if name == "flux" else "unet"
        convert(str(folder / "adapter"), out=str(folder / "file"), to="diffusers", part=part)
        file = "pytorch_lora_weights.safetensors"
        base.load_lora_adapter(str(folder / "file"), prefix=part, weight_name=file, local_files_only=True)
        return base
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder / "adapter")).eval()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert not differs(a, b), float((a - b).abs().max() / b.abs().max())


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) > CLOSE * float(b.abs().max())


def main() -> None:
    """Writes the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    rows = []
    for name in families.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, Path(folder)))
    before, _, rest = text.partition(HEAD.splitlines()[0])
    after = rest.partition("\n\n")[2]
    PAGE.write_text(before + "\n".join([HEAD, *rows]) + "\n\n" + after, encoding="utf-8")


if __name__ == "__main__":
    main()
