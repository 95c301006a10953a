"""A step of training by shapes alone, on tensors without content: its memory and its operations, in no time and no memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from veneer.adapt.attached import base_parameters
from veneer.analyse.cost.flops import Flops, counting
from veneer.analyse.cost.memory import Live, Saved, n_bytes
from veneer.ops.chunked import CHUNK, cross_entropy
from veneer.sites.own import CHILD, is_own, split
from veneer.tasks.head import cut

LOOK = "find_packed_sequence_indices"


class Shape(NamedTuple):
    """The batches of a step: windows and tokens of each in one pass, learned tokens of the pass, passes of the step.

    packed: whether a window holds several texts, which takes a mask (rows, 1, tokens, tokens).
    """

    rows: int
    tokens: int
    labels: int
    passes: int = 1
    packed: bool = False


class Memory(NamedTuple):
    """Bytes by part; peak: the most that exists at once, which the parts, not all there at the same time, may exceed."""

    weights: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    peak: int

    @property
    def growth(self) -> int:
        """What a step takes on top of the loaded model and its adapter."""
        return self.peak - self.weights - self.adapter


class Step(NamedTuple):
    """What one step takes."""

    memory: Memory
    flops: Flops


def step(
    model: nn.Module,
    shape: Shape,
    *,
    base: torch.dtype | None = None,
    full: bool = False,
    autocast: bool = False,
    states: int | None = None,
) -> Step:
    """The step that trains the acting adapters, or the base alone if `full`.

    base: what the model's own floating-point numbers are held in, unless as they are; autocast: products in bfloat16;
    states: bytes that the optimiser keeps, AdamW's unless given.
    """
    own = base_parameters(model)
    trained = (
        set(own) if full else {n for n, p in model.named_parameters() if n not in own and _acts(model, n)}
    )
    training = model.training
    device = next(iter(own.values())).device
    with FakeTensorMode():
        tensors = {
            **{
                n: _fake(p, base if n in own else None, n in trained, device)
                for n, p in model.named_parameters()
            },
            **{n: _fake(b, None, False, device) for n, b in model.named_buffers() if n},
        }
        masters = {n: t for n, t in tensors.items() if n not in own and _acts(model, n)}
        kept = {n: t for n, t in tensors.items() if n not in masters and not is_own(n)}
        learned = [t for n, t in tensors.items() if n in trained]
        try:
            model.train()
            with _unpacked():
                found = _run(model, tensors, shape, device, autocast)
        finally:
            model.train(training)
    gradients = sum(t.numel() * t.element_size() for t in learned)
    states = 2 * gradients + 4 * len(learned) if states is None else states
    weights, adapter = n_bytes(kept.values()), n_bytes(masters.values())
    logits = _logits(model, shape, 2 if autocast else _width(kept))
    peak = weights + adapter + states + found.live
    return Step(Memory(weights, adapter, gradients, states, found.saved, logits, peak), found.flops)


@contextmanager
def _unpacked() -> Iterator[None]:
    """Within the block transformers does not look into positions for packed texts, as there is nothing to see in them."""
    masks: Any = sys.modules.get("transformers.masking_utils")
    find = getattr(masks, LOOK, None)
    if find is None:
        yield
        return
    setattr(masks, LOOK, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masks, LOOK, find)


class _Found(NamedTuple):
    live: int
    saved: int
    flops: Flops


def _run(
    model: nn.Module, tensors: dict[str, Tensor], shape: Shape, device: torch.device, autocast: bool
) -> _Found:
    live, saved = Live(), Saved(tensors.values())
    named = {f"model.{n}": t for n, t in tensors.items()}
    with counting(model, shape.passes) as flops, live, saved.watching():
        for _ in range(min(shape.passes, 2)):  # from the second pass on the gradients of the first are there
            torch.func.functional_call(_Pass(model), named, (shape, device, autocast))
    return _Found(live.made.peak, saved.kept.peak, flops.found())


class _Pass(nn.Module):
    """The objective on a batch of a shape, where no token is looked at, and its gradient.

    Both are one call, so that blocks that are computed again backward find the same tensors as forward.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, shape: Shape, device: torch.device, autocast: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            total = self._loss(shape, device)
        total.backward()

    def _loss(self, shape: Shape, device: torch.device) -> Tensor:
        ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.int64, device=device)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if shape.packed:
            inputs["attention_mask"] = torch.ones(
                shape.rows, 1, shape.tokens, shape.tokens, dtype=torch.bool, device=device
            )
        targets = ids.new_zeros(shape.labels)
        head = cut(self.model)
        if head is None:
            return F.cross_entropy(
                self.model(**inputs).logits.flatten(0, 1)[: shape.labels].float(), targets, reduction="sum"
            )
        features = head.features(inputs).flatten(0, 1).index_select(0, targets)
        return cross_entropy(features, targets, head.logits, head.parameters())


def _acts(model: nn.Module, name: str) -> bool:
    """Whether a tensor of this name belongs to a change that acts now."""
    place = split(name)
    return place is not None and place[1].split(".")[0] in model.get_submodule(f"{place[0]}.{CHILD}").active  # type: ignore[operator]


def _fake(t: Tensor, dtype: torch.dtype | None, trained: bool, device: torch.device) -> Tensor:
    dtype = dtype if dtype is not None and t.is_floating_point() else t.dtype
    return torch.empty(t.shape, dtype=dtype, device=device if t.is_meta else t.device, requires_grad=trained)


def _width(kept: dict[str, Tensor]) -> int:
    return max(t.element_size() for t in kept.values() if t.ndim > 1)


def _logits(model: nn.Module, shape: Shape, width: int) -> int:
    """Bytes of the logits and of their gradient that exist at a time, at `width` bytes a number."""
    vocabulary = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    rows = min(CHUNK, shape.labels) if cut(model) is not None else shape.rows * shape.tokens
    return 2 * rows * vocabulary * width
