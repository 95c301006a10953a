"""Refuses a backward pass that would recompute a layer with other adapters than its forward pass had.

Activation checkpointing runs layers again in the backward. If strengths, `using` or a bank's rows changed in
between, the gradient would belong to another function, silently.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from veneer.adapt.acting.forward import Deltas
from veneer.adapt.acting.passes import Passes
from veneer.errors import SiteError
from veneer.methods.base.protocols import Switched

State = tuple[Any, ...]


def refuse_other_state(deltas: Deltas) -> None:
    """Raises SiteError if the layer is computed again in another state; comes before its change is computed.

    Checkpointing may leave a module as soon as it has the tensors that it needs.
    """
    if torch.compiler.is_compiling():
        return
    notes, task = deltas.passes, torch._C._current_graph_task_id()
    if task == -1:
        return
    notes.recomputed = task
    state = _state(deltas)
    if notes.mismatch == task or (not notes.graded and notes.bare and state not in notes.bare):
        raise _error(deltas, state)


def note(deltas: Deltas, output: Any) -> None:
    """Notes the state of a forward pass."""
    noted = deltas.training or torch.is_grad_enabled()
    if torch.compiler.is_compiling() or not noted or torch._C._current_graph_task_id() != -1:
        return
    notes = deltas.passes
    if notes.recomputed is not None:
        notes = deltas.passes = Passes()
    if not torch.is_grad_enabled():
        state = _state(deltas)
        if state not in notes.bare:
            notes.bare.append(state)
        return
    notes.graded = True
    checkpointed = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    if checkpointed:
        outputs = output if isinstance(output, tuple) else (output,)
        for y in outputs:
            if isinstance(y, Tensor) and y.requires_grad:
                y.register_hook(functools.partial(_met, deltas, notes, _state(deltas)))


def _met(deltas: Deltas, notes: Passes, then: State, gradient: Tensor) -> None:
    """Compares the state of a forward pass with the present one, when its output's gradient arrives."""
    state = _state(deltas)
    if state == then:
        return
    notes.mismatch = torch._C._current_graph_task_id()
    if notes.recomputed == notes.mismatch:
        raise _error(deltas, state)


def _state(deltas: Deltas) -> State:
    switched = (deltas[name] for name in deltas.active)
    return dict(deltas.active), *(d.state() for d in switched if isinstance(d, Switched))


def _error(deltas: Deltas, state: State) -> SiteError:
    return SiteError(
        f"layer {deltas.site.name!r} is computed again in the backward pass (activation checkpointing), and"
        f" other adapters act now ({state[0] or 'none'}) or on other rows than in the forward pass; call"
        " backward() before strengths, using() or use() change"
    )
