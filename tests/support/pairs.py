"""Adapters in the common form for the tests of conversion, and changes to files on disk."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models

from veneer.convert import Pair, Pairs
from veneer.convert.base import of_model
from veneer.convert.tensor_files import metadata

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE = of_model(models.llama())
SIZES = {
    "q": (32, 32),
    "k": (16, 32),
    "v": (16, 32),
    "o": (32, 32),
    "gate": (48, 32),
    "up": (48, 32),
    "down": (32, 48),
}
CLOSE = dict(rtol=0, atol=2e-5)  # logits of size 4 through two layers in float32


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def pair(
    out: int,
    in_: int,
    rank: int = 4,
    scaling: float = 2.0,
    *,
    seed: int = 0,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    m = draw(out, seed=seed + 2).abs().to(dtype) if dora else None
    return Pair(
        draw(rank, in_, seed=seed, dtype=dtype), draw(out, rank, seed=seed + 1, dtype=dtype), scaling, m
    )


def llama_pairs(**options) -> Pairs:
    """Pairs for every projection of the tiny Llama."""
    names = [
        (f"model.layers.{i}.{'mlp' if n in ('gate', 'up', 'down') else 'self_attn'}.{n}_proj", n, i)
        for i in (0, 1)
        for n in SIZES
    ]
    return Pairs({name: pair(*SIZES[n], seed=10 * i, **options) for name, n, i in names}, origin="owner/tiny")


def same(a: Pairs, b: Pairs) -> None:
    """Equal bit for bit, scalings up to the last digit of a double."""
    assert set(a.sites) == set(b.sites)
    for n, p in a.sites.items():
        q = b.sites[n]
        assert torch.equal(p.A, q.A) and torch.equal(p.B, q.B), n
        assert p.A.dtype == q.A.dtype and p.kind == q.kind
        assert p.scaling == pytest.approx(q.scaling, rel=1e-7)  # kohya keeps alpha in float32
        assert (p.magnitude is None) == (q.magnitude is None) and (
            p.magnitude is None or torch.equal(p.magnitude, q.magnitude)
        )


def spoil(folder, change) -> None:
    """Changes the tensors of the one safetensors file in a folder."""
    (file,) = folder.glob("*.safetensors")
    tensors, header = load_file(file), metadata(file)
    change(tensors)
    save_file(tensors, file, header)


def edit(folder, **changes) -> None:
    """Changes adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
