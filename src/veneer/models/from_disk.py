"""Opens a causal language model whose blocks stay on disk and are read one at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from veneer import foreign
from veneer.compress.quantise import quantise
from veneer.errors import ConfigError, FormatError, first_few, option
from veneer.models import pretrained
from veneer.models.compressed import hollow_model
from veneer.models.on_disk import Extent, Shelf, as_bytes
from veneer.models.streamed import files_of, names_of
from veneer.ops import quant
from veneer.sites import changed, site_for
from veneer.sites.blocks import stack
from veneer.sites.quantised_linear import QuantisedLinear
from veneer.units import size

# https://huggingface.co/docs/safetensors: 8 bytes for the length of a JSON header, the header, the tensors
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WHERE = option("stream_base")


def from_disk(
    name: str, dtype: torch.dtype, device: torch.device, quantised: str | None = None, near: Path = Path(".")
) -> nn.Module:
    """Returns the model in folder `name`, in eval mode, frozen, with its blocks on disk.

    dtype: of the weights. quantised: a format of the linear layers; the packed blocks go to a file without a
    name on the disk of `near`, which the system removes when this process ends, however it ends. What lies
    outside of the blocks is in memory. Raises ConfigError and FormatError for a model that cannot be read
    block by block.
    """
    if not hasattr(os, "preadv"):
        raise ConfigError(f"{WHERE} needs Linux or macOS; leave it out")
    folder = _folder(name)
    model = hollow_model(pretrained.config(name), dtype).eval().requires_grad_(False)
    own = getattr(model, "_keep_in_fp32_modules", None)
    if own and dtype != torch.float32:
        raise ConfigError(f"{WHERE}: {type(model).__name__} keeps {first_few(own)} in float32; use fp32")
    blocks, prefix = _blocks(model)
    tensors = _Tensors(model, folder)
    if quantised is not None:
        tensors.pack(model, quantised)
    inside = {n for n, p in model.named_parameters() if n.startswith(prefix)}
    _fill_outside(model, tensors, inside, device)
    names = [{n: f"{prefix}{i}.{n}" for n, _ in b.named_parameters()} for i, b in enumerate(blocks)]
    if quantised is not None:
        tensors.check_room(names, near)
    shelf = Shelf(list(blocks), lambda i: tensors.block(i, names[i]), device)
    weakref.finalize(shelf, _close, tensors.handles)
    generation = folder / "generation_config.json"
    if generation.is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    model.name_or_path = name
    return model  # type: ignore[no-any-return]


def _folder(name: str) -> Path:
    """Returns the folder with the model's files. Raises ConfigError."""
    folder = Path(pretrained.source(name))
    if not folder.is_dir():
        raise ConfigError(
            f"{WHERE} reads a folder of safetensors, got model {name!r}; download it (hf download {name}"
            " --local-dir DIR) and give the folder"
        )
    if changed.kind_of_folder(name) is not None:
        raise ConfigError(f"{WHERE} needs a plain base, got the changed layers of {name}; leave it out")
    return folder


def _blocks(model: nn.Module) -> tuple[nn.ModuleList, str]:
    """Returns the model's stack of blocks, and the prefix of its parameters. Raises ConfigError."""
    found = stack(model)
    if found is None:
        raise ConfigError(f"{WHERE} needs a model of repeated blocks, which {type(model).__name__} lacks")
    prefix = next(f"{n}." for n, m in model.named_modules() if m is found)
    inside = [id(p) for b in found for p in b.parameters()]
    outside = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(prefix)}
    if len(set(inside)) < len(inside) or outside & set(inside):
        raise ConfigError(f"{WHERE}: blocks of {type(model).__name__} share weights; leave it out")
    return found, prefix


class _Tensors:
    """The tensors of a model's files by the model's own names, packed where the model is quantised."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.handles: list[int] = []
        stored = {
            n: e for file in sorted(set(files_of(folder).values())) for n, e in self._open(folder / file)
        }
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.files: dict[str, Extent] = {}
        self.packed: dict[str, QuantisedLinear] = {}
        self.spill: int | None = None
        self._turned: set[str] = set()
        self._done: dict[int, dict[str, Extent]] = {}
        self._last: tuple[str, quant.Parts] | None = None
        state = model.state_dict(keep_vars=True)
        wanted = names_of(model)
        for n in wanted:
            found = stored.get(n) or stored.get(n.removeprefix(prefix))
            if found is not None:
                self.files[n] = found
        odd = [n for n in wanted if n not in self.files]
        odd += [n for n in self.files if self.files[n].shape != tuple(state[n].shape)]
        if odd:
            raise FormatError(
                f"{folder}: {WHERE} needs files with the weights as {type(model).__name__} names them;"
                f" {len(odd)} are missing or of another shape: {first_few(odd)}; leave it out"
            )

    def _open(self, path: Path) -> Iterator[tuple[str, Extent]]:
        """Yields the tensors of a safetensors file, by name. Raises FormatError for a damaged one."""
        try:
            with safe_open(path, "pt"):  # checks the header and the length
                pass
        except SafetensorError as e:
            raise FormatError(f"{path} is damaged ({e}); download it again") from None
        handle = os.open(path, os.O_RDONLY)
        self.handles.append(handle)
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        header = foreign.loads(os.pread(handle, length, 8).decode())
        for name, entry in header.items():
            if name != "__metadata__":
                begin = 8 + length + entry["data_offsets"][0]
                yield name, Extent(handle, begin, DTYPES[entry["dtype"]], tuple(entry["shape"]), str(path))

    def pack(self, model: nn.Module, format: str) -> None:
        """Quantises the model's empty layers; their parts are made when they are read."""
        before = {n: m for n, m in model.named_modules() if "weight" in m._parameters}
        quantise(model, format)
        self.packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}
        self._turned = {n for n in self.packed if site_for(n, before[n]).kind == "transposed"}
        self.like = dict(model.named_parameters())
        self._dtypes = {n: before[n].weight.dtype for n in self.packed}

    def read(self, name: str, like: Tensor) -> Tensor:
        """Returns a tensor of the model, of the dtype of `like`."""
        owner, _, last = name.rpartition(".")
        layer = self.packed.get(owner)
        if layer is None or last not in layer.format.names:
            return self.files[name].read().to(like.dtype)
        if self._last is None or self._last[0] != owner:
            W = self.files[f"{owner}.weight"].read().to(self._dtypes[owner])
            W = W.mT if owner in self._turned else W
            self._last = owner, layer.format.pack(W.bfloat16().to(W.dtype))
        return self._last[1][layer.format.names.index(last)]

    def check_room(self, blocks: list[dict[str, str]], near: Path) -> None:
        """Opens a file without a name for packed blocks. Raises ConfigError if the disk lacks room."""
        there = next(p for p in (near, *near.absolute().parents) if p.is_dir())
        needed, free = (
            sum(self.like[w].nbytes for some in blocks for w in some.values()),
            shutil.disk_usage(there).free,
        )
        if needed > free:
            raise ConfigError(
                f"{WHERE} needs {size(needed)} for packed blocks in {there}, and {size(free)} are free;"
                f" choose another {option('out')}"
            )
        with tempfile.TemporaryFile(dir=there) as file:
            self.spill = os.dup(file.fileno())
        self.handles.append(self.spill)

    def block(self, number: int, names: dict[str, str]) -> dict[str, Extent]:
        """Returns the tensors of a block by the names of its parameters, packed at its first read."""
        if self.spill is None:
            return {n: self.files[w] for n, w in names.items()}
        if number not in self._done:
            self._done[number] = {n: self._spilled(w) for n, w in names.items()}
        return self._done[number]

    def _spilled(self, name: str) -> Extent:
        """Writes a tensor to the file of packed blocks."""
        assert self.spill is not None
        found, handle = self.read(name, self.like[name]).contiguous(), self.spill
        begin = os.lseek(handle, 0, os.SEEK_END)
        view = as_bytes(found)
        done = 0
        while done < len(view):
            done += os.write(handle, view[done : done + (1 << 30)])
        return Extent(handle, begin, found.dtype, tuple(found.shape), "the file of packed blocks")


def _fill_outside(model: Any, tensors: _Tensors, inside: set[str], device: torch.device) -> None:
    """Loads everything but the parameters of blocks, buffers included."""
    state = model.state_dict(keep_vars=True)
    parameters = dict(model.named_parameters())
    for n in names_of(model):
        if n in inside:
            continue
        found = tensors.read(n, state[n]).to(device)
        owner, _, last = n.rpartition(".")
        module = model.get_submodule(owner)
        if n in parameters:
            module._parameters[last] = nn.Parameter(found, requires_grad=False)
        else:
            module._buffers[last] = found
    for n, b in list(model.named_buffers()):
        owner, _, last = n.rpartition(".")
        model.get_submodule(owner)._buffers[last] = b.to(device)
    model.tie_weights()


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)
