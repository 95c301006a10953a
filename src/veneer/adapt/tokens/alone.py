"""PEFT's TRAINABLE_TOKENS: rows of an embedding, and of a tied head, without a change beside them.

https://huggingface.co/docs/peft/package_reference/trainable_tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from veneer import foreign
from veneer.adapt.attached import Changes
from veneer.adapt.peft.beside import ROWS, Beside
from veneer.adapt.peft.origin import origin
from veneer.adapt.peft.settings import PREFIX, general
from veneer.adapt.peft.targets import Config, expressions, targeted
from veneer.adapt.store.problems import Problem
from veneer.errors import first_few
from veneer.methods.base.token_rows import TokenRows
from veneer.sites import Site
from veneer.sites.own import base_modules
from veneer.sites.roles import embeddings

TYPE = "TRAINABLE_TOKENS"
END = "trainable_tokens_delta"
OWN: Config = {"token_indices": [], "init_weights": True}  # settings of this type alone


def is_alone(config: Mapping[str, object]) -> bool:
    """Returns True for settings of this type."""
    return config.get("peft_type") == TYPE


def every() -> Config:
    """Returns all settings of the type with their defaults."""
    always, others = general()
    return {**always, **others, **OWN}


def to_changes(
    model: nn.Module, config: Config, tensors: Mapping[str, Tensor]
) -> tuple[Changes, list[Problem]]:
    """Returns the rows as deltas, not attached, and all problems with them.

    For tied weights PEFT keeps a copy of the rows under each name; copies must be equal.
    """
    modules = base_modules(model)
    config = {"target_modules": None, **config}
    if config["target_modules"] is None:
        config["target_modules"] = [n for n, m in modules.items() if m is embeddings(model, "input")]
    foreign.check_expressions(expressions(config), list(modules), "adapter_config.json")
    names = {id(m._parameters.get("weight")): n for n, m in reversed(modules.items()) if targeted(config, n)}
    by_name = {_plain(k): t for k, t in tensors.items()}
    changes: Changes = []
    beside = Beside(model, {f"{n}.{ROWS}": t for n, t in by_name.items()}, changes, set())
    beside.rows({"trainable_token_indices": dict.fromkeys(names.values(), config["token_indices"])})
    problems = beside.problems
    if not names:
        text = f"no layer of the model matches target_modules={config['target_modules']!r}"
        problems.append(Problem("fit", text))
    problems += _left_over(modules, names, by_name)
    return changes, problems


def _plain(key: str) -> str:
    """Returns "model.embed_tokens" for its rows' name in the file."""
    return key.removeprefix(PREFIX).removesuffix(f".{END}").removesuffix(".base_layer")


def _left_over(
    modules: Mapping[str, nn.Module], names: Mapping[int, str], tensors: Mapping[str, Tensor]
) -> list[Problem]:
    """Returns problems with rows of other layers, and with copies for a tied weight that differ."""
    unused, different = [], []
    for name, t in tensors.items():
        owner = modules.get(name)
        used = None if owner is None else names.get(id(owner._parameters.get("weight")))
        if used is None:
            unused.append(f"{name}.{END} {tuple(t.shape)}")
        elif used in tensors and not torch.equal(t, tensors[used]):
            different.append(f"{name} and {used}")
    found = []
    if unused:
        text = f"{len(unused)} tensors belong to no layer: {first_few(unused)}"
        found.append(Problem("unused", text))
    if different:
        text = f"{first_few(different)} share a weight, and the file holds different rows for them"
        found.append(Problem("fit", f"{text}; untie the model first"))
    return found


def write(
    model: nn.Module, rows: Sequence[tuple[Site, TokenRows]]
) -> tuple[Config, dict[str, Tensor]] | None:
    """Returns settings and tensors of PEFT's type, or None for rows that it cannot express.

    PEFT has one list of tokens for all layers, and gives a tied head the rows of the embedding.
    """
    tokens, *others = [delta.tokens for _, delta in rows]
    if any(t != tokens for t in others):
        return None
    first = {id(delta.D): site.name for site, delta in reversed(rows)}
    always, _ = general()
    always = {k: v for k, v in always.items() if k != "modules_to_save"}  # which the type lacks
    config = {**always, **origin(model, []), "peft_type": TYPE, **OWN}
    config |= {"target_modules": sorted(first.values()), "token_indices": tokens}
    return config, {f"{PREFIX}{site.name}.{END}": delta.rows(site) for site, delta in rows}
