"""A weight with changes of low rank that acts as their sum, and multiplies factor by factor where it can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 16  # bytes: grouped products ask for rows of a multiple of it


class Low(NamedTuple):
    """W' = (1 + excess) W + B A: A (.., k, in), B (.., out, k) and excess (.., out), or None for 0."""

    A: Tensor
    B: Tensor
    excess: Tensor | None

    def onto(self, W: Tensor, *, flipped: bool) -> Tensor:
        """Returns W' for W (.., out, in), or for its transpose if flipped."""
        D = self.B @ self.A
        if self.excess is not None:
            D = D + self.excess[..., None] * (W.mT if flipped else W)
        return W + (D.mT if flipped else D).to(W.dtype)


class Changed(Tensor):
    """W (n, .., ..), or one matrix of it, in the place of a parameter while its module runs.

    Products with a vector on the input side cost W's own and one of rank k. Any other operation gets the
    dense sum. raw: W in the layout of the parameter; flipped: True if its last dimension is the output.
    low: makes the change for one matrix, for several by their numbers, or for all (None).
    """

    raw: Tensor
    flipped: bool
    low: Callable[[int | Tensor | None], Low]

    @staticmethod
    def of(raw: Tensor, low: Callable[[int | Tensor | None], Low], *, flipped: bool) -> Changed:
        """Returns W with the change. raw: W, or a parameter of which it is a view."""
        made = raw.as_subclass(Changed)
        made.raw, made.low, made.flipped = raw, low, flipped
        return made

    def dense(self) -> Tensor:
        """Returns W' as a plain tensor."""
        return self.low(None).onto(self.raw, flipped=self.flipped)

    def turned(self) -> Changed:
        """Returns the transpose of the matrices, with the change still apart."""
        return Changed.of(self.raw.mT, self.low, flipped=not self.flipped)

    def picked(self, index: int | Tensor) -> Changed:
        """Returns one matrix of a stack, or several by their numbers."""
        return Changed.of(self.raw[index], lambda _: self.low(index), flipped=self.flipped)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = HANDLERS.get(func)
        if kwargs and own not in (_linear, _grouped):
            own = None  # the others know their arguments by place
        found = NotImplemented if own is None else own(func, *args, **kwargs)
        if found is not NotImplemented:
            return found
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") in ASKED or _attribute(func) in ATTRIBUTES:
                return func(*(_raw(a) for a in args), **kwargs)
            return func(*_dense(args), **_dense(kwargs))


# Questions about a tensor that its numbers do not answer.
ASKED = {"size", "dim", "numel", "stride", "is_floating_point", "element_size", "get_device", "__len__"}
ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "itemsize"}


def _attribute(func: Any) -> str:
    return getattr(getattr(func, "__self__", None), "__name__", "") if func.__name__ == "__get__" else ""


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Changed) else value


def _dense(value: Any) -> Any:
    if isinstance(value, Changed):
        return value.dense()
    if isinstance(value, dict):
        return {k: _dense(v) for k, v in value.items()}
    return type(value)(map(_dense, value)) if type(value) in (list, tuple) else value


def _transpose(func: Any, W: Changed, *dims: int) -> Any:
    same = {d % W.raw.ndim for d in dims} == {W.raw.ndim - 2, W.raw.ndim - 1}
    return W.turned() if same or (not dims and W.raw.ndim == 2) else NotImplemented


def _mt(func: Any, W: Changed) -> Any:
    return W.turned()


def _item(func: Any, W: Changed, index: Any) -> Any:
    if W.raw.ndim != 3 or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, Tensor) and index.ndim == 0 and index.dtype in (torch.int64, torch.int32):
        index = int(index)
    if isinstance(index, int):
        return W.picked(index % len(W.raw))
    return W.picked(index) if isinstance(index, Tensor) and index.ndim == 1 else NotImplemented


def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:  # named as in PyTorch
    if not isinstance(weight, Changed) or weight.flipped:
        return NotImplemented
    y = _added(F.linear(input, weight.raw), weight.low(None), lambda t, M: F.linear(t, M), input)
    return y if bias is None else y + bias


def _matmul(func: Any, a: Any, b: Any) -> Any:
    if isinstance(b, Changed) and b.flipped and a.ndim > 1:  # a vector's products have no dimension for rows
        return _added(func(a, b.raw), b.low(None), lambda t, M: func(t, M.mT), a)
    if isinstance(a, Changed) and not a.flipped and b.ndim == a.raw.ndim:
        turned = _added(func(a.raw, b).mT, a.low(None), lambda t, M: func(t, M.mT), b.mT)
        return turned.mT
    return NotImplemented


def _grouped(func: Any, x: Any, W: Any, *rest: Any, offs: Any = None, **more: Any) -> Any:
    apart = isinstance(W, Changed) and W.flipped and W.raw.ndim == 3 and x.ndim == 2
    if not apart or rest or any(value is not None for value in more.values()):
        return NotImplemented
    low = _padded(W.low(None), x.element_size())
    if low.excess is not None:  # a row of y belongs to the first expert that ends behind it
        owner = torch.searchsorted(offs, torch.arange(len(x), device=x.device, dtype=offs.dtype), right=True)
        low = low._replace(excess=low.excess[owner.clamp_max(len(W.raw) - 1)])
    return _added(func(x, W.raw, offs=offs), low, lambda t, M: func(t, M.mT, offs=offs), x)


def _added(y: Tensor, low: Low, product: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns y = W x with the change; product(x, M) multiplies x by M (.., k, in)."""
    if low.excess is not None:
        gain = low.excess.to(y.dtype)
        y = y + y * (gain if gain.ndim == 1 or gain.ndim == y.ndim else gain[..., None, :])
    if not low.A.shape[-2]:
        return y
    change = product(product(x, low.A.to(x.dtype)), low.B.to(x.dtype))
    return change.add_(y)


def _padded(low: Low, itemsize: int) -> Low:
    """Returns the change with its rank filled up by zeros to whole groups of ALIGNED bytes."""
    short = -low.A.shape[-2] % (ALIGNED // itemsize)
    if not short:
        return low
    return low._replace(A=F.pad(low.A, (0, 0, 0, short)), B=F.pad(low.B, (0, short)))


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.bmm: _matmul,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.bmm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
    Tensor.t: _transpose,
    torch.t: _transpose,
    Tensor.__getitem__: _item,
    Tensor.mT.__get__: _mt,  # type: ignore[attr-defined]
    **{f: _grouped for o, n in ((F, "grouped_mm"), (torch, "_grouped_mm")) if (f := getattr(o, n, None))},
}
