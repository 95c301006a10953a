"""GGUF's LoRA adapters: <tensor>.weight.lora_a (r, in) and .lora_b (out, r), for `llama-server --lora`.

https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer import files
from veneer.convert import gguf_layout
from veneer.convert.base import Base
from veneer.convert.pairs import Pairs, bare, folded, only
from veneer.errors import FormatError, first_few

FILE = "adapter.gguf"
ALPHA = 0.0  # llama.cpp then scales nothing; the scaling is part of lora_b


def write(pairs: Pairs, folder: Path, base: Base) -> list[str]:
    """Writes the folder, completely or not at all, and compares the file with the adapter.

    Raises ConfigError without the base's sizes, FormatError for convolutions, embeddings and DoRA.
    """
    base.need("heads", "kv_heads", "layers", "kind", why="GGUF orders the rows of queries by heads")
    ready, notes = folded(bare(pairs))
    only(ready, ("linear",), "GGUF", magnitude=False)
    called = gguf_layout.names(ready.sites, base.kind, base.layers or 0)
    tensors: dict[str, Tensor] = {}
    for name, pair in ready.sites.items():
        tensors[f"{called[name]}.weight.lora_a"] = pair.A
        tensors[f"{called[name]}.weight.lora_b"] = gguf_layout.permuted(name, pair.B, base)
    with files.replacing(folder / FILE) as (path,):
        _write(path, tensors, gguf_layout.architecture(base.kind).name, pairs.origin)
        check(path, tensors)
    return notes


def _write(path: Path, tensors: Mapping[str, Tensor], arch: str, origin: str | None) -> None:
    gguf = gguf_layout.package()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    if origin:
        writer.add_name(Path(origin).name)
    for name, t in tensors.items():
        writer.add_tensor(name, t.detach().float().cpu().numpy())
    finish(writer)


def finish(writer: Any) -> None:
    """Writes everything and closes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Reads the file back. Raises FormatError for tensors that are missing or differ."""
    there = read(path)
    wrong = [n for n, t in wanted.items() if n not in there or not torch.equal(there[n], t.detach().float())]
    if wrong or set(there) - set(wanted):
        raise FormatError(f"{path.name}: read back, these tensors differ: {first_few(wrong)}")


def read(path: Path) -> dict[str, Tensor]:
    """Returns the float32 tensors of a GGUF file by name."""
    reader = gguf_layout.package().GGUFReader(path)
    return {t.name: torch.from_numpy(t.data.copy()).view(*t.shape.tolist()[::-1]) for t in reader.tensors}
