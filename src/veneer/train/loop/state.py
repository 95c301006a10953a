"""What a training needs to go on exactly where it was: trained parameters, moments, random numbers, and where it stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.adapt.attached import layers
from veneer.errors import FormatError, first_few
from veneer.sites.own import is_own
from veneer.train.folder.checkpoint import Checkpoint
from veneer.train.loop.step import Learner


@dataclass
class Position:
    """Where a training stands after `step` steps; figures are bits per byte by text."""

    step: int = 0
    tokens: int = 0
    positions: int = 0  # tokens and padding
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    evaluated: int = -1  # the last step whose evaluation is done
    before: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best: dict[str, float] = field(default_factory=dict)

    def as_meta(self, metrics: int) -> dict[str, Any]:
        """For the checkpoint; metrics: length of metrics.jsonl in bytes."""
        return {"position": asdict(self), "metrics_bytes": metrics}

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> tuple[Position, int]:
        """The position, and the length of metrics.jsonl in bytes."""
        return cls(**meta["position"]), meta["metrics_bytes"]


def fixed(learner: Learner) -> dict[str, Tensor]:
    """b.<name>: what the adapters hold beside their parameters, such as a start that is subtracted."""
    trained = {id(p) for d in layers(learner.model) for p in d.parameters()}
    held = learner.model.state_dict(keep_vars=True)
    return {f"b.{n}": t for n, t in held.items() if is_own(n) and id(t) not in trained}


def tensors(learner: Learner) -> dict[str, Tensor]:
    """p.<name>: parameters, b.<name>: see fixed, o.<name>.<key>: AdamW's state, rng and rng.cuda: the state of the random numbers."""
    found = {"rng": torch.get_rng_state(), **fixed(learner)}
    device = learner.parts[0].parameter.device
    if device.type == "cuda":
        found["rng.cuda"] = torch.cuda.get_rng_state(device)
    for part in learner.parts:
        found[f"p.{part.name}"] = part.parameter
        for key, value in learner.optimiser.state.get(part.parameter, {}).items():
            found[f"o.{part.name}.{key}"] = value
    return found


def restore(learner: Learner, saved: Checkpoint) -> None:
    """Puts everything back. Raises FormatError, before anything is changed, if the checkpoint is of other parameters."""
    held = fixed(learner)
    wanted = {
        **{f"p.{p.name}": tuple(p.parameter.shape) for p in learner.parts},
        **{n: tuple(t.shape) for n, t in held.items()},
    }
    there = {n: tuple(t.shape) for n, t in saved.tensors.items() if n.startswith(("p.", "b."))}
    wrong = sorted(n for n in {*wanted, *there} if wanted.get(n) != there.get(n))
    if wrong:
        raise FormatError(
            f"the checkpoint of step {saved.step} is of other parameters: {first_few(wrong)}; begin anew in another folder"
        )
    put_back(learner, saved)
    for name, t in held.items():
        t.copy_(saved.tensors[name])
    for part in learner.parts:
        prefix = f"o.{part.name}."
        state = {n.removeprefix(prefix): t for n, t in saved.tensors.items() if n.startswith(prefix)}
        if state:
            device = part.parameter.device
            learner.optimiser.state[part.parameter] = {k: t.clone().to(device) for k, t in state.items()}
    torch.set_rng_state(saved.tensors["rng"])
    if "rng.cuda" in saved.tensors:
        torch.cuda.set_rng_state(saved.tensors["rng.cuda"], learner.parts[0].parameter.device)


@torch.no_grad()
def put_back(learner: Learner, saved: Checkpoint) -> None:
    """The trained parameters alone."""
    for part in learner.parts:
        part.parameter.copy_(saved.tensors[f"p.{part.name}"])
