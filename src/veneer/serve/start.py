"""Builds a server from a model, its adapters and options."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import dtypes
from veneer.adapt import attached, switch
from veneer.adapt.banks import entries
from veneer.adapt.banks.segments import SegmentBank
from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError
from veneer.models import machine, pretrained
from veneer.serve import kernels
from veneer.serve.adapters.proof import Prover
from veneer.serve.adapters.reading import Reader
from veneer.serve.adapters.registry import Registry
from veneer.serve.adapters.slots import Slots
from veneer.serve.adapters.version import Forms
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.prefixes import Prefixes
from veneer.serve.engine.steps import choice
from veneer.serve.engine.steps.runner import Limits
from veneer.serve.engine.supervisor import Supervisor
from veneer.serve.options import Options, adapters_of, options_of
from veneer.serve.server import Parts, Server

log = logging.getLogger("veneer.serve")
CONTEXT = 4096  # of models that state no limit


def serve(
    model: str | nn.Module = "builtin",
    adapters: Mapping[str, str | Path] | str | Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    allow: tuple[str, ...] = (),
    **options: Any,
) -> Server:
    """Starts a server in this process.

    model: a name or folder, or a model with its tokenizer=; adapters: {name: folder or attached adapter}, or
    a root folder that is watched for adapters; name: of the base in requests; device, dtype: of a model that
    is loaded here; allow: words for what to let through, see veneer.load; options: see
    veneer.serve.options.Options. Raises ConfigError for unknown options, and FormatError for adapters that
    cannot be served.

    >>> with veneer.serve("builtin", {"french": "out/french"}) as server:
    ...     print(server.complete("Bonjour", "french@0.75", max_tokens=20).text)
    """
    chosen = options_of(options)
    root, given = adapters_of(adapters)
    base, words = _loaded(model, tokenizer, device, dtype)
    memory = _in_memory(base, given)
    switch.activate(base)
    reader = Reader(
        base, root=root, most_bytes=chosen.adapter_size << 20, most_rank=chosen.max_rank, allow=allow
    )
    served = name or (model if isinstance(model, str) else base.name_or_path or "base")
    parts = _parts(base, words, reader, chosen, served)
    server = Server(base, words, chosen, name=served, root=root, parts=parts).start()
    return _filled(server, memory, given)


def _filled(
    server: Server, memory: Mapping[str, tuple[Forms, str]], given: Mapping[str, str | Path]
) -> Server:
    try:
        for key, (forms, content) in memory.items():
            server.registry.give(key, forms, content)
        for key in given.keys() - memory.keys():
            server.load(key, given[key])
    except BaseException:
        server.close()
        raise
    return server


def _parts(model: Any, tokenizer: Tokenizer, reader: Reader, options: Options, name: str) -> Parts:
    bank = kernels.bank(model) if options.one_pass else SegmentBank(model)
    slots = Slots(bank, options.slots)
    limits = Limits(
        options.running, options.step_tokens, options.cache_tokens, _context(model, options), options.patience
    )
    engine = Engine(
        choice.runner(model, bank, options.engine),
        slots,
        tokenizer,
        _ends(model, tokenizer),
        limits,
        Prefixes(options.prefix_cache << 20),
    )
    registry = Registry(
        reader,
        slots,
        engine.call,
        Prover(reader.copy, engine),
        base=name,
        memory=options.adapter_memory << 20,
    )
    engine.door.fetch = registry.memory.fetch
    return Parts(engine, registry, Supervisor(engine))


def _loaded(
    model: str | nn.Module, tokenizer: Tokenizer | None, device: str, dtype: str
) -> tuple[Any, Tokenizer]:
    if isinstance(model, str):
        number_format = dtypes.of_name(dtype)
        words = pretrained.tokenizer(model) if tokenizer is None else tokenizer
        return pretrained.causal_lm(model, number_format, machine.device(device)), words
    if tokenizer is None:
        raise ConfigError("serve: a model that is given as an object needs its tokenizer=")
    return model.eval(), tokenizer


@torch.no_grad()
def _in_memory(model: nn.Module, given: Mapping[str, str | Path]) -> dict[str, tuple[Forms, str]]:
    """Returns the normal forms of attached adapters, with a hash of their numbers."""
    there = attached.adapters(model)
    found = entries.entries(model, {key: a for key, a in given.items() if a in there})
    return {key: (entry.forms, _hash(entry.forms)) for key, entry in found.items()}


def _hash(forms: Forms) -> str:
    digest = hashlib.sha256()
    for name, (_, form) in sorted(forms.items()):
        for part in (form.factors, form.products or ()):
            for n, t in enumerate(part):
                digest.update(f"{name} {n} {None if t is None else tuple(t.shape)} ".encode())
                digest.update(b"" if t is None else t.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _ends(model: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the tokens that end an answer: the generation settings', and the tokenizer's."""
    settings = getattr(model, "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    every = [*(own if isinstance(own, list | tuple) else [own]), getattr(tokenizer, "eos_token_id", None)]
    return frozenset(int(t) for t in every if t is not None)


def _context(model: Any, options: Options) -> int:
    own = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or CONTEXT)
    if options.context is not None and options.context > own:
        raise ConfigError(f"context must be at most the model's {own} tokens, got {options.context}")
    return options.context or own
