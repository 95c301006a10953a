"""A run made ready: texts, model and settings read and checked against each other, with nothing written yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer import embedded, methods, optim
from veneer.adapt import attach, attached, hooks, switch
from veneer.adapt.store import fingerprint
from veneer.analyse.numbers import started
from veneer.data.pack import collate
from veneer.errors import ConfigError
from veneer.methods.full import Full
from veneer.models import machine
from veneer.optim.base import groups
from veneer.runs import base_model, start_calibration, start_left
from veneer.runs.texts import decided as texts_decided
from veneer.runs.texts import streamed, texts
from veneer.runs.texts.texts import Text
from veneer.train import checks, rates
from veneer.train.loop.progress import Voice
from veneer.train.run import Run
from veneer.train.speed import compiling, frozen_blocks, frozen_cache, graphs
from veneer.train.speed.frozen_blocks import Prefix
from veneer.units import size
from veneer.version import __version__

NAME = "default"  # of the adapter
TRIED = 32  # tokens that the model is tried on


class Ready(NamedTuple):
    """run: with every setting decided; parts: what is trained; optimiser: by what; config: the content of config.json; frozen: the
    blocks that are computed once for each window, None where the run does not ask for that."""

    run: Run
    model: nn.Module
    parts: list[groups.Part]
    optimiser: optim.Optimiser
    pad: int
    texts: dict[str, Text]
    config: dict[str, Any]
    frozen: Prefix | None = None

    @property
    def trained(self) -> optim.Trained:
        """What the optimiser is made for."""
        return _trained(self.run, self.parts)


def prepare(run: Run, device: torch.device, voice: Voice, *, only_shapes: bool = False) -> Ready:
    """Reads and checks everything, the cheap things first. Raises the errors of what does not fit.

    only_shapes: what is trained need not start where a training would start.
    """
    run = decided(texts.named(run), device)
    with voice.phase("reading texts"):
        run, tokenizer, ready = read(run, voice)
    with voice.phase("loading the model"):
        model, stats = base_model.base(run, run.base_dtype, device, voice, only_shapes=only_shapes)
    checks.check_length(model, run.window)
    checks.check_vocabulary(model, (w for t in ready.values() for w in t.windows))
    base = {"model": run.model, "class": type(model).__name__, "sha256": fingerprint.measure(model)["sha256"]}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if start_calibration.needed(run):
        blank = only_shapes or start_calibration.goes_on(run)
        stats = (
            start_calibration.unseen(model, run)
            if blank
            else start_calibration.look(model, run, ready["train"].windows, pad, voice)
        )
    with voice.phase("starting the adapter"):
        parts = adapt(model, run, stats)
    begun = {} if only_shapes else _begun(model, run, stats, voice)
    compiling.recompute(model, run.gradient_checkpointing)
    ids = _try_out(model, run, ready)
    prefix = _frozen(model, ids, run, ready["train"], voice) if run.cache_frozen else None
    optimiser = optim.make(run.optimiser, **run.optimiser_options)
    optimiser.build(_trained(run, parts))  # before anything is written: it may find no pair of factors
    voice.say(_described(model, run, parts))
    announcement = optimiser.announcement(_trained(run, parts))
    if announcement:
        voice.say(announcement)
    voice.say("; ".join(texts.counted(part, t.facts) for part, t in ready.items()))
    config = {
        "veneer": __version__,
        "versions": machine.versions(),
        "run": asdict(run),
        "data": {part: t.facts for part, t in ready.items()},
        "base": base,
        **begun,
        "notes": list(voice.said),
    }
    return Ready(run, model, parts, optimiser, pad, ready, config, prefix)


def read(run: Run, voice: Voice) -> tuple[Run, Any, dict[str, Text]]:
    """Returns the run with its length decided, the tokenizer, and the texts by part, a stream's beginning.

    Raises DataError, ConfigError.
    """
    rows = (streamed if run.stream else texts).gather(run, voice)
    tokenizer = texts_decided.tokenizer_of(run, voice)
    encoded = texts.encode_all(rows, run, tokenizer)
    texts_decided.say_template(rows, tokenizer, voice)
    looked_at = streamed.looked_at(run, tokenizer) if run.stream else encoded["train"]
    run = texts_decided.with_length(run, looked_at, voice)
    found = texts.prepare_all(encoded, run, tokenizer, voice)
    return run, tokenizer, streamed.begin(found, run, tokenizer, voice) if run.stream else found


def decided(run: Run, device: torch.device) -> Run:
    """The run with the settings that depend on method, model and machine."""
    rated = optim.make(run.optimiser, **run.optimiser_options).rated_as
    lr = run.lr or rates.default(
        run.method, rated, run.model == embedded.PREFIX, str(run.options.get("init"))
    )
    fastest = max(lr, run.embedding_lr or 0.0)
    if fastest * run.weight_decay >= 1:
        problem = (
            f"weight_decay {run.weight_decay:g} at rate {fastest:g} leaves nothing of a weight in one step"
        )
        raise ConfigError(f"{problem}; use less than {1 / fastest:g}")
    if run.compile == "graphs" and (against := graphs.reason_against(device)):
        raise ConfigError(against)
    epochs = None if run.steps else run.epochs or 1.0
    options = {
        **{name: p.default for name, p in optim.options_of(run.optimiser).items()},
        **run.optimiser_options,
    }
    return replace(
        run,
        lr=lr,
        optimiser_options=options,
        epochs=epochs,
        precision=run.precision_on(device),
        device=str(device),
    )


def adapt(model: nn.Module, run: Run, stats: Mapping[str, methods.Stats] | None = None) -> list[groups.Part]:
    """Attaches the adapter, or opens the base for full fine-tuning: what is trained. Raises ConfigError, SiteError, ShapeError."""
    if run.trains_base:
        switch.train_only(model, hooks.BASE)
        _keep_frozen(
            model,
            {
                id(p)
                for s in Full.find(model, run.to, run.exclude)
                for p in s.module.parameters(recurse=False)
            },
        )
        parts = groups.of_base(model)
    else:
        seed = {"seed": run.seed} if "seed" in methods.options_of(methods.get(run.method)) else {}
        layers: dict[str, Any] = {
            name: getattr(run, name) for name in ("to", "exclude", "untie", "rank_pattern", "alpha_pattern")
        }
        attach.attach(model, run.method, name=NAME, stats=stats, **layers, **{**seed, **run.options})
        parts = groups.of_adapter(model, NAME)
    if run.embedding_lr is not None and not any(p.embedding for p in parts):
        raise ConfigError(
            "embedding_lr is given, but no embedding is changed; leave it out, or adapt embeddings with to="
        )
    return parts


def _begun(
    model: nn.Module, run: Run, stats: Mapping[str, methods.Stats] | None, voice: Voice
) -> dict[str, Any]:
    """What a start that is taken out of the weights leaves there, for config.json."""
    init = start_left.of_weights(run)
    layers = start_left.left(model, NAME, stats) if init else {}
    if init is None or not layers:
        return {}
    found = start_left.described(init, layers)
    voice.say(started(found))
    return {"start": found}


def _keep_frozen(model: nn.Module, trained: set[int]) -> None:
    """Of the base only these parameters, by id, take gradients."""
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)


def _trained(run: Run, parts: list[groups.Part]) -> optim.Trained:
    embedding = 1.0 if run.embedding_lr is None or run.lr is None else run.embedding_lr / run.lr
    return optim.Trained(parts, run.betas, embedding)


def _try_out(model: nn.Module, run: Run, ready: Mapping[str, Text]) -> Tensor:
    """Returns the first text's first token ids (1, t), on which the model was tried. Raises its errors."""
    windows = [w for t in ready.values() for w in t.windows]
    ids = collate([w[:1] for w in windows[:1]], 0)["input_ids"][:, :TRIED]
    ids = ids.to(next(model.parameters()).device)
    if run.trains_base:
        checks.check_leaves(model, ids)
    else:
        checks.check_called(model, ids)
    if any(len(w) > 1 for w in windows):
        checks.check_packing(model)
    return ids


def _frozen(model: nn.Module, ids: Tensor, run: Run, train: Text, voice: Voice) -> Prefix:
    """The blocks below the first adapted one. Raises ConfigError where what leaves them cannot be kept."""
    found = frozen_blocks.look(model, ids)
    needed = found.bytes(train.facts["tokens"])
    frozen_cache.check_room(Path(run.out), needed)
    voice.say(
        f"what leaves the {found.first} blocks below the first adapted one is kept until the end, in {size(needed)} on disk"
    )
    return found


def _described(model: nn.Module, run: Run, parts: list[groups.Part]) -> str:
    n, total = sum(p.parameter.numel() for p in parts), attached.n_base_parameters(model)
    if run.trains_base:
        return f"full fine-tuning: all {n:,} parameters are trained, at lr {run.lr:g}"
    found = attached.changes(model, NAME)
    forms = [d.to_peft(site) for site, d in found if isinstance(d, methods.PeftStored)]
    scales = sorted({round(s, 6) for form in forms if (s := _scale(form)) is not None})
    scale = (
        f"; scale {' to '.join(f'{s:g}' for s in (scales[:1] + scales[-1:] if len(scales) > 1 else scales))}"
        if scales
        else ""
    )
    lr = f"lr {run.lr:g}{rates.borrowed(run.method, run.lr or 0.0)}"
    trained = f"{n:,} trained parameters, {n / total:.2%} of the model's {total:,}"
    return f"{run.method} on {len(found)} layers: {trained}{scale}; {lr}"


def _scale(form: methods.PeftForm | None) -> float | None:
    """What B A is multiplied by, as PEFT computes it from rank and alpha."""
    if form is None or "lora_alpha" not in form.config:
        return None
    rank, alpha = int(form.config["r"]), float(form.config["lora_alpha"])
    return alpha / math.sqrt(rank) if form.config.get("use_rslora") else alpha / rank
