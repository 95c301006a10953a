"""A module's own parameters as one flat vector: the site of full fine-tuning, norms and biases included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer.sites.base import Site


class LeafSite(Site):
    """W is (n, 1): all parameters that `module` holds itself, in their order.

    A change acts inside the module, which runs once with W' in place of W for any arguments and outputs.
    """

    kind = "leaf"
    is_matrix = False
    factored = False
    swaps_weights: ClassVar[bool] = True

    def __init__(self, name: str, module: nn.Module) -> None:
        self.parameters = [n for n, _ in module.named_parameters(recurse=False)]
        super().__init__(name, module)

    def weight(self) -> Tensor:
        return torch.cat([self._own(n).reshape(-1, 1) for n in self.parameters])

    def _own(self, name: str) -> Tensor:
        """Returns a parameter, or the tensor that stands in for it while a step is simulated."""
        found: Tensor = getattr(self.module, name)
        return found

    def split(self, W: Tensor) -> dict[str, Tensor]:
        """Returns W (n, 1) as the parameters by their names in the module, in the module's dtypes."""
        like = [self._own(n) for n in self.parameters]
        parts = torch.split(W.flatten(), [p.numel() for p in like])
        return {
            n: part.view_as(p).to(p.dtype) for n, part, p in zip(self.parameters, parts, like, strict=True)
        }

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        for n, part in self.split(W).items():
            self.module.get_parameter(n).copy_(part)

    def put(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Puts other tensors in the parameters' places and returns the former ones; nothing is written."""
        return put_parameters(self.module, values)

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """Returns the module's output on x with its parameters replaced by M (n, 1), without hooks."""
        given = {f"inner.{n}": p for n, p in self.split(M).items()}
        y: Tensor = functional_call(_Bare(self.module), given, (x,))
        return y

    def drop(self, x: Tensor, p: float) -> Tensor:
        return x

    def shift(self) -> Tensor | None:
        return None


def put_parameters(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """Puts other tensors in the places of a module's parameters and returns the former ones."""
    own: dict[str, Any] = module._parameters
    before = {n: own[n] for n in values}
    own.update(values)
    if isinstance(module, nn.RNNBase):  # reads a list of its own
        module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]
    return before


class _Bare(nn.Module):
    """The module without its hooks, so that a hook may call it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner.forward(x)
        return y
