"""Keys and values of prompt beginnings, kept by content: the adapters' hashes and strengths, the tenant, and
the tokens.

Blocks are copies: a block that is thrown away or replaced is never seen by a request that runs.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from veneer.serve.engine.steps.lanes import Pair, Strip

BLOCK = 32  # tokens


class Prefixes:
    """A cache of blocks of BLOCK tokens, at most `limit` bytes, least recently used first out."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.blocks: OrderedDict[bytes, tuple[bytes, dict[int, Pair]]] = OrderedDict()
        self.asked = self.hit = 0  # prompt tokens

    def take(self, namespace: bytes, tokens: Sequence[int], strip: Strip) -> int:
        """Copies the longest known beginning of a prompt into the strip, less than the whole. Returns its
        length.
        """
        length = 0
        self.asked += len(tokens)
        for key in _keys(namespace, tokens[: len(tokens) - 1]):
            found = self.blocks.get(key)
            if found is None:
                break
            self.blocks.move_to_end(key)
            for layer, (K, V) in found[1].items():
                strip.write(layer, K, V, length)
            length += BLOCK
        self.hit += length
        return length

    def add(
        self, namespace: bytes, tokens: Sequence[int], source: Callable[[int], Pair], layers: Sequence[int]
    ) -> None:
        """Keeps the whole blocks of `tokens`.  source: keys and values (1, heads, >= len(tokens), head_dim)
        by layer.
        """
        if not self.limit:
            return
        for n, key in enumerate(_keys(namespace, tokens)):
            if key in self.blocks:
                self.blocks.move_to_end(key)
                continue
            own = slice(n * BLOCK, (n + 1) * BLOCK)
            pairs = {i: Pair(*(t[0, :, own].clone() for t in source(i))) for i in layers}
            self.blocks[key] = namespace, pairs
            self.bytes += _bytes(pairs)
        while self.bytes > self.limit:
            self._drop(next(iter(self.blocks)))

    def forget(self, namespaces: set[bytes]) -> None:
        """Drops all blocks of these namespaces."""
        for key in [k for k, (namespace, _) in self.blocks.items() if namespace in namespaces]:
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        self.bytes -= _bytes(self.blocks.pop(key)[1])


def namespace(adapters: Sequence[tuple[str, float]], tenant: str = "") -> bytes:
    """Returns the key of an adapter expression, (content hash, strength) each, for one tenant; order does not
    matter.
    """
    content = ";".join(f"{h}@{float(s).hex()}" for h, s in sorted(adapters))
    return hashlib.sha256(f"veneer-prefix\n{len(tenant)}:{tenant}\n{content}".encode()).digest()


def _keys(namespace: bytes, tokens: Sequence[int]) -> list[bytes]:
    """One key for each whole block; a block's key holds all before it."""
    keys, key = [], namespace
    for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
        block = torch.tensor(tokens[at : at + BLOCK], dtype=torch.int64).numpy().tobytes()
        key = hashlib.blake2b(key + block, digest_size=32).digest()
        keys.append(key)
    return keys


def _bytes(pairs: dict[int, Pair]) -> int:
    tensors: list[Tensor] = [t for pair in pairs.values() for t in pair]
    return sum(t.numel() * t.element_size() for t in tensors)
