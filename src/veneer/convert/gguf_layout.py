"""GGUF's names and order of rows: tensors of llama.cpp by the names of transformers' modules.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from veneer.convert.base import Base
from veneer.errors import ConfigError, FormatError, first_few

EXTRA = "the package gguf is not installed; pip install 'veneer[gguf]'"


class Architecture(NamedTuple):
    """llama.cpp's name of a model_type. interleaved: rotary pairs are neighbours, so rows are permuted."""

    name: str
    interleaved: bool


ARCHITECTURES = {
    "llama": Architecture("llama", True),
    "mistral": Architecture("llama", True),
    "qwen2": Architecture("qwen2", False),
    "qwen3": Architecture("qwen3", False),
}


def package() -> Any:
    """Returns the module gguf. Raises ConfigError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ConfigError(EXTRA) from None
    return gguf


def architecture(kind: str | None) -> Architecture:
    """Returns the architecture of a model_type. Raises ConfigError for one that is not supported."""
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"GGUF is written for models of type {', '.join(ARCHITECTURES)}, got {kind!r};"
            " export a folder, and convert it by llama.cpp's own script"
        )
    return ARCHITECTURES[kind]


def names(modules: Iterable[str], kind: str | None, layers: int) -> dict[str, str]:
    """Returns GGUF's name of every module, without ".weight". Raises FormatError for modules without one."""
    gguf = package()
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture(kind).name)
    table = gguf.get_tensor_name_map(arch, layers)
    found = {name: table.get_name(name) for name in modules}
    lost = [name for name, theirs in found.items() if theirs is None]
    if lost:
        raise FormatError(f"GGUF has no tensor for {first_few(lost)}; leave these layers out")
    return found


def permuted(name: str, rows: Tensor, base: Base) -> Tensor:
    """Returns the rows of a weight (or of B) of module `name` in llama.cpp's order.

    Queries and keys of interleaved architectures: half-and-half pairs of a head become neighbours.
    """
    heads = {"q_proj": base.heads, "k_proj": base.kv_heads}.get(name.rpartition(".")[2])
    if heads is None or not architecture(base.kind).interleaved:
        return rows
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape).contiguous()
