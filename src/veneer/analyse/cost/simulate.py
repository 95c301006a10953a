"""Runs a training step by shapes alone, on tensors without content: its memory and its operations."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.adapt.attached import base_parameters, layers
from veneer.analyse.cost.flops import Count, Flops, counting, per_step
from veneer.analyse.cost.memory import Live, Saved
from veneer.analyse.cost.repeats import Repeats, Stretch
from veneer.analyse.cost.stand_ins import StandIns, stand_ins
from veneer.sites.blocks import stack
from veneer.sites.own import is_own
from veneer.tasks.base.abilities import Outlined
from veneer.tasks.base.shape import Shape

LOOK = "find_packed_sequence_indices"


class Memory(NamedTuple):
    """Bytes by part. peak: the most at once; the parts, not all alive at the same time, may sum to more."""

    weights: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    peak: int

    @property
    def growth(self) -> int:
        """Returns the bytes of a step on top of the loaded model and its adapter."""
        return self.peak - self.weights - self.adapter


class Step(NamedTuple):
    """Memory and operations of one step."""

    memory: Memory
    flops: Flops


def step(
    model: nn.Module,
    shape: Shape,
    task: Outlined,
    *,
    base: torch.dtype | None = None,
    full: bool = False,
    autocast: bool = False,
    states: int | None = None,
) -> Step:
    """Returns what a step takes that trains the acting adapters, or the base alone if `full`.

    base: dtype of the model's own floating-point numbers, their present one unless given; autocast: products
    in bfloat16; states: bytes that the optimiser keeps, AdamW's unless given. Blocks alike run once.
    """
    parts = _parts(model, base, full)
    training = model.training
    try:
        model.train()
        with FakeTensorMode(), _unpacked(), stand_ins(parts.stand_in) as fakes:
            taken = _pass(model, fakes, shape, task, parts.device, autocast)
    finally:
        model.train(training)
    weights, adapter, gradients = map(parts.n_bytes, (parts.own, parts.acting, parts.trained))
    states = 2 * gradients + 4 * len(parts.trained) if states is None else states
    width = 2 if autocast else max(parts.dtype(t).itemsize for t in parts.own if t.ndim > 1)
    earlier = gradients if shape.passes > 1 else 0
    peak = weights + adapter + states + earlier + taken.made.high
    logits = 2 * task.outputs(model, shape) * width  # and their gradient
    memory = Memory(weights, adapter, gradients, states, taken.kept.high, logits, peak)
    return Step(memory, per_step(taken.counts, shape.passes))


class _Parts(NamedTuple):
    """Tensors of the base (own) and of the acting adapters; converted: dtypes of those held in another."""

    own: list[Tensor]
    acting: list[Tensor]
    trained: list[Tensor]
    converted: dict[int, torch.dtype]
    learned: set[int]
    device: torch.device

    def dtype(self, t: Tensor) -> torch.dtype:
        """Returns what the step holds the tensor in."""
        return self.converted.get(id(t), t.dtype)

    def n_bytes(self, tensors: Iterable[Tensor]) -> int:
        """Returns the bytes of the tensors in the step."""
        return sum(t.numel() * self.dtype(t).itemsize for t in tensors)

    def stand_in(self, t: Tensor) -> Tensor:
        """Returns a tensor without content for one of the model's."""
        device, learned = self.device if t.is_meta else t.device, id(t) in self.learned
        return torch.empty(t.shape, dtype=self.dtype(t), device=device, requires_grad=learned)


def _parts(model: nn.Module, base: torch.dtype | None, full: bool) -> _Parts:
    parameters: list[Tensor] = list(base_parameters(model).values())
    changes = [d[name] for d in layers(model) for name in d.active]
    buffers = [b for name, b in model.named_buffers() if name and not is_own(name)]
    acting = [t for change in changes for t in (*change.parameters(), *change.buffers())]
    acting = list({id(t): t for t in acting}.values())
    masters: list[Tensor] = [t for t in acting if isinstance(t, nn.Parameter)]
    trained = parameters if full else masters
    converted = {id(p): base for p in parameters if base is not None and p.is_floating_point()}
    learned = {id(t) for t in trained}
    device = next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))
    return _Parts([*parameters, *buffers], acting, trained, converted, learned, device)


@contextmanager
def _unpacked() -> Iterator[None]:
    """Keeps transformers from looking for packed texts in positions, which have no content here."""
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


class _Meter(TorchDispatchMode):
    """Counts the memory and the operations of all that is computed within the block."""

    def __init__(self, live: Live, count: Count) -> None:
        super().__init__()
        self.live, self.count = live, count
        self.resting = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.resting:
            self.live.see(args, kwargs or {}, out)
            self.count.see(func, args, kwargs or {}, out)
        return out


def _pass(
    model: nn.Module, fakes: StandIns, shape: Shape, task: Outlined, device: torch.device, autocast: bool
) -> Stretch:
    """Runs the last of the passes of a step. The gradients of earlier ones are there, and not counted."""
    live, saved = Live(), Saved()
    with counting(model) as count:
        meter = _Meter(live, count)

        def ready(module: nn.Module, without: Collection[nn.Module] = ()) -> None:
            meter.resting = True
            for t in fakes.put(module, without):
                saved.leave_out(t)
                if t.requires_grad and shape.passes > 1:
                    t.grad = torch.empty_like(t)
            meter.resting = False

        repeats = Repeats(live.made, saved.kept, count.numbers, ready)
        blocks = stack(model)
        ready(model, [] if blocks is None else [blocks])
        with repeats.watching(model), meter, saved.watching():
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                total = task.outline(model, shape, device, repeats.counted)
            total.backward()
        return repeats.found()
