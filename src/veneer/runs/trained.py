"""Opens the parameters that a run trains: those of an adapter, or the base's own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from veneer import methods, optim
from veneer.adapt import attach, attached, hooks, switch
from veneer.adapt.tokens.add import train_rows
from veneer.errors import ConfigError
from veneer.methods.full import Full
from veneer.optim.base import groups
from veneer.sites import LeafSite
from veneer.sites.finding.kinds import kind_of
from veneer.sites.roles import output_head
from veneer.train import rates
from veneer.train.run import Run

NAME = "default"  # of the adapter


class Aside(NamedTuple):
    """Modules of a task that no adapter changes: heads, which are trained whole, and unused ones.

    tokens: ids of new tokens, whose rows are trained.
    """

    heads: list[str]
    unused: list[str]
    tokens: Mapping[str, int] = MappingProxyType({})


def open_parameters(
    model: nn.Module, run: Run, stats: Mapping[str, methods.Stats] | None = None, aside: Aside | None = None
) -> list[groups.Part]:
    """Attaches the adapter, or opens the base for full fine-tuning; returns the trained parameters.

    aside: modules of the task that no adapter changes. Raises ConfigError, SiteError, ShapeError.
    """
    aside = aside or Aside([], [])
    parts = _of_base(model, run, aside) if run.trains_base else _of_adapter(model, run, stats, aside)
    if run.embedding_lr is not None and not any(p.embedding for p in parts):
        raise ConfigError(
            "embedding_lr needs a trained embedding; leave it out, or adapt embeddings with to="
        )
    return parts


def _of_base(model: nn.Module, run: Run, aside: Aside) -> list[groups.Part]:
    switch.train_only(model, hooks.BASE)
    sites = Full.find(model, run.to, run.exclude)
    used = [s for s in sites if s.name not in aside.unused]
    trained = {id(p) for s in used for p in s.module.parameters(recurse=False)}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    return groups.of_base(model)


def _of_adapter(
    model: nn.Module, run: Run, stats: Mapping[str, methods.Stats] | None, aside: Aside
) -> list[groups.Part]:
    seed = {"seed": run.seed} if "seed" in methods.options_of(methods.get(run.method)) else {}
    layers: dict[str, Any] = {
        name: getattr(run, name) for name in ("to", "untie", "rank_pattern", "alpha_pattern")
    }
    layers["exclude"] = _excluded(model, run, [*aside.heads, *aside.unused])
    attach.attach(model, run.method, name=NAME, stats=stats, **layers, **{**seed, **run.options})
    if aside.heads:
        _train_whole(model, aside.heads)
    if aside.tokens:
        train_rows(model, aside.tokens, NAME)
    return groups.of_adapter(model, NAME)


def _excluded(model: nn.Module, run: Run, aside: Sequence[str]) -> str | tuple[str, ...]:
    """Returns the layers to leave out: those of the run, and those aside that all-linear would adapt."""
    outside = output_head(model)
    if run.to not in (None, "all-linear"):
        return run.exclude
    own = [name for name in aside if name not in outside and kind_of(model.get_submodule(name))]
    if isinstance(run.exclude, str):
        return "|".join([f"(?:{run.exclude})", *map(re.escape, own)]) if own else run.exclude
    return (*run.exclude, *own)


def _train_whole(model: nn.Module, heads: Sequence[str]) -> None:
    """Adds changes of whole modules to the adapter, as PEFT's modules_to_save. Raises SiteError."""
    sites = [LeafSite(name, model.get_submodule(name)) for name in heads]
    hooks.refuse_clash(sites)
    hooks.hang(model, NAME, [(site, methods.build(Full, site, {})) for site in sites])
    switch.train_only(model, NAME)


def for_optimiser(run: Run, parts: list[groups.Part]) -> optim.Trained:
    """Returns the parameters as optimisers take them."""
    embedding = 1.0 if run.embedding_lr is None or run.lr is None else run.embedding_lr / run.lr
    return optim.Trained(parts, run.betas, embedding)


def described(model: nn.Module, run: Run, parts: list[groups.Part]) -> str:
    """Returns a sentence on method, parameters, scale and rate."""
    n, total = sum(p.parameter.numel() for p in parts), attached.n_base_parameters(model)
    if run.trains_base:
        return f"full fine-tuning: all {n:,} parameters are trained, at lr {run.lr:g}"
    found = attached.changes(model, NAME)
    forms = [d.to_peft(site) for site, d in found if isinstance(d, methods.PeftStored)]
    scales = sorted({round(s, 6) for form in forms if (s := _scale(form)) is not None})
    ends = dict.fromkeys(scales[:1] + scales[-1:])
    scale = f"; scale {' to '.join(f'{s:g}' for s in ends)}" if scales else ""
    lr = f"lr {run.lr:g}{rates.borrowed(run.method, run.lr or 0.0)}"
    trained = f"{n:,} trained parameters, {n / total:.2%} of the model's {total:,}"
    return f"{run.method} on {len(found)} layers: {trained}{scale}; {lr}"


def _scale(form: methods.PeftForm | None) -> float | None:
    """Returns the factor of B A that PEFT computes from rank and alpha."""
    if form is None or not {"r", "lora_alpha"} <= form.config.keys():
        return None
    rank, alpha = int(form.config["r"]), float(form.config["lora_alpha"])
    return alpha / math.sqrt(rank) if form.config.get("use_rslora") else alpha / rank
