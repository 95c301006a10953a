"""One training: every setting of `veneer fit` declared once, with its type, default, unit and help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from veneer import dtypes, methods, optim, settings
from veneer.errors import ConfigError, suggest
from veneer.methods import inits
from veneer.settings import REQUIRED, about, setting
from veneer.train.track import available as trackers

# Checks that allow= may turn off, each by name; what was allowed is recorded with the run.
ALLOWED = {
    "ratio": "a ratio of LoRA+ below 1",
    "truncate": "cutting rows that are longer than length",
    "config": "going on with other settings than the run began with",
    "data": "going on with other texts than the run began with",
    "base": "going on on another base model than the run began with",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of one training. Raises ConfigError, naming all of them, for settings that make no sense (together)."""

    data: tuple[str, ...] = setting(
        REQUIRED,
        "texts to learn from: files (.txt, .jsonl, .csv, .parquet, ..), datasets, builtin:prose; NAME@2: twice an epoch",
    )
    model: str = setting("builtin", "base model: a Hugging Face folder or id, or builtin")
    valid: tuple[str, ...] = setting((), "texts to choose the best step by; a tenth of data unless given")
    test: tuple[str, ...] = setting(
        (), "texts measured before and after only, never chosen by; the result is valid's without them"
    )
    known: tuple[str, ...] = setting(
        (), "texts whose forgetting is measured; none: no text; builtin:known for the built-in model"
    )
    method: str = setting(
        "lora", "how the model is changed: a method of veneer, or full for all its parameters"
    )
    to: str | tuple[str, ...] | None = setting(
        None,
        "layers to adapt: all-linear, a regular expression, or names and endings of names; the method's own choice unless given",
    )
    exclude: str | tuple[str, ...] = setting((), "layers to leave out, as in to")
    untie: bool = setting(False, "adapt layers that share their weight with another one")
    options: dict[str, Any] = field(
        default_factory=dict, metadata=about("the method's own options, such as rank and alpha")
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata=about("other ranks, by ending or pattern of a layer's name")
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata=about("other alphas, in the same way")
    )
    calibration: int = setting(
        64, "windows of data that a start such as loraga looks at before the training", unit="windows"
    )
    optimiser: str = setting("adamw", f"what makes steps of gradients: {', '.join(optim.available())}")
    optimiser_options: dict[str, Any] = field(
        default_factory=dict, metadata=about("the optimiser's own options, such as LoRA+'s ratio")
    )
    lr: float | None = setting(
        None, "peak learning rate (of A, under LoRA+); depends on model, method and optimiser unless given"
    )
    embedding_lr: float | None = setting(
        None, "peak learning rate of what changes embeddings; lr unless given"
    )
    weight_decay: float = setting(0.0, "W, or the product B A, shrinks by (1 - rate * decay) a step")
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "AdamW's decay rates of the gradient's mean and square"
    )
    clip: float = setting(1.0, "largest norm of the whole gradient; 0: not clipped")
    steps: int | None = setting(None, "length of the training", unit="steps")
    epochs: float | None = setting(
        None, "length of the training if steps is not given; 1 unless given", unit="passes over data"
    )
    batch: int = setting(8, "windows in one forward pass", unit="windows")
    accumulate: int = setting(1, "forward passes a step", unit="passes")
    length: int = setting(256, "longest window", unit="tokens")
    packing: bool = setting(True, "several short texts in a window; they do not see each other")
    stream: bool = setting(
        False, "read data a row at a time while it is learned, and never hold it as a whole; needs steps"
    )
    buffer: int = setting(1024, "of a stream: what is held, and the next window drawn from", unit="windows")
    train_on: Literal["completion", "all"] = setting(
        "completion", "what is learned: completions and assistant turns, or all text"
    )
    train_roles: tuple[str, ...] = setting(("assistant",), "whose turns of a conversation are learned")
    label_smoothing: float = setting(
        0.0, "spread over the vocabulary while learning, not in evaluations", unit="share of each label"
    )
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "the rate after warm-up")
    warmup: float = setting(0.05, "straight rise of the rate", unit="share of the steps")
    precision: Literal["auto", "bf16", "fp32", "bfloat16", "float32"] = setting(
        "auto",
        "bf16: adapters on a bfloat16 base; full keeps float32 weights under autocast. auto: bf16 where the processor has it",
    )
    quantise: Literal["nf4", "int8"] | None = setting(
        None,
        "keep the frozen base's linear layers in 4 or 8 bits a number (QLoRA): nf4 or int8; as they are unless given",
    )
    compile: Literal["auto", "on", "off", "graphs"] = setting(
        "auto",
        "torch.compile of the model's blocks and of the loss: faster steps for a minute at the start. auto: in long runs;"
        " graphs: on, with CUDA graphs (not yet tried on a GPU)",
    )
    gradient_checkpointing: bool = setting(
        False,
        "keep only what enters each block and compute the rest again backward: less memory, a third more time",
    )
    cache_frozen: bool = setting(
        False,
        "keep on disk, in out, what leaves the blocks below the first adapted one, and compute it once for each window of data",
    )
    device: str = setting("auto", "where to compute: cpu, cuda, cuda:1, ..; auto: cuda where there is one")
    seed: int = setting(0, "decides starts, order, dropout and what is split off")
    eval_every: int | None = setting(
        None, "distance of evaluations; a fifth of the run unless given", unit="steps"
    )
    eval_windows: int = setting(
        24, "windows that are evaluated of each text, evenly spaced; 0: all", unit="windows"
    )
    save_every: int | None = setting(
        None, "distance of checkpoints; as eval_every unless given", unit="steps"
    )
    keep: int = setting(3, "newest checkpoints to keep, beside the best one", unit="checkpoints")
    out: str = setting("runs/fit", "folder of the run")
    report: bool = setting(
        True, "measure the strength dial, the layers and samples at the end, and write report.html"
    )
    track: tuple[str, ...] = setting(
        (), f"where to show the figures too, without a network; several with commas: {', '.join(trackers())}"
    )
    resume: bool = setting(False, "go on in out from the newest valid checkpoint; begin where there is none")
    allow: tuple[str, ...] = setting((), f"checks to turn off: {', '.join(ALLOWED)}")

    def __post_init__(self) -> None:
        hints = settings.table(type(self))
        problems = []
        for f in fields(self):
            try:
                object.__setattr__(self, f.name, settings.suit(getattr(self, f.name), hints[f.name].hint))
            except ValueError as e:
                problems.append(f"{f.name}: {e}")
        object.__setattr__(self, "precision", dtypes.in_short(self.precision))
        if isinstance(self.track, tuple):
            object.__setattr__(
                self, "track", tuple(name for entry in self.track for name in entry.split(","))
            )
        problems = problems or list(_problems(self))
        if problems:
            raise ConfigError("\n".join(problems))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """A run from settings by name. Raises one ConfigError for all that is unknown, missing or unsuitable."""
        method, optimiser = values.get("method", cls.method), values.get("optimiser", cls.optimiser)
        inside: dict[str, Any] = {
            "options": methods.options_of(methods.get(method)) if method in methods.available() else (),
            "optimiser_options": optim.options_of(optimiser) if optimiser in optim.available() else (),
        }
        try:
            return settings.from_dict(cls, values, inside)
        except ConfigError as e:  # add the problems of options, which are checked later
            owners = {"options": f"method {method!r}", "optimiser_options": f"optimiser {optimiser!r}"}
            own = [(owner, values.get(key), inside[key]) for key, owner in owners.items()]
            more = [
                s
                for owner, v, known in own
                if isinstance(v, Mapping) and known != ()
                for s in _of_options(owner, v, known)
            ]
            raise ConfigError("\n".join(dict.fromkeys([*str(e).splitlines(), *more]))) from None

    @classmethod
    def from_yaml(cls, file: str | Path) -> Run:
        """A run from a YAML file of settings. Raises ConfigError."""
        path = Path(file)
        if not path.is_file():
            raise ConfigError(f"{path} does not exist")
        return cls.from_dict(settings.read_yaml(path.read_text(encoding="utf-8"), str(path)))


class Range(NamedTuple):
    """What a number must be, in words and as a test."""

    words: str
    names: tuple[str, ...]
    least: float
    most: float = float("inf")
    open: bool = False  # whether `least` itself is excluded


RANGES = [
    Range("above 0", ("lr", "embedding_lr", "epochs"), 0, open=True),
    Range("0 or more", ("weight_decay", "clip", "eval_windows", "seed"), 0),
    Range(
        "1 or more",
        ("steps", "batch", "accumulate", "length", "buffer", "eval_every", "save_every", "calibration"),
        1,
    ),
    Range("2 or more, so that one is left if the newest is damaged", ("keep",), 2),
    Range("in [0, 1)", ("warmup", "label_smoothing"), 0, 1),
]


def _problems(run: Run) -> Iterator[str]:
    for r in RANGES:
        for name in r.names:
            value = getattr(run, name)
            if value is not None and not (
                (value > r.least or (value == r.least and not r.open)) and value < r.most
            ):
                yield f"{name} {value:g} must be {r.words}"
    if not all(0 <= b < 1 for b in run.betas):
        yield f"betas {run.betas} must both be in [0, 1)"
    if not run.data:
        yield "data names no text; give files (.txt, .jsonl), builtin:prose or builtin:c"
    if run.steps is not None and run.epochs is not None:
        yield f"steps {run.steps} and epochs {run.epochs:g} both set the length; give one of them"
    if run.stream and run.steps is None:
        yield "stream: how long an epoch is would only be known at its end; give steps"
    if run.stream and run.cache_frozen:
        yield "cache_frozen keeps something for every window of data, and a stream's are not known before; leave one of them out"
    if run.buffer != type(run).buffer and not run.stream:
        yield f"buffer {run.buffer} is of a stream; use stream=True, or leave it out"
    if "none" in run.known and len(run.known) > 1:
        yield f"known is 'none' and {', '.join(k for k in run.known if k != 'none')} at once; give one of them"
    if run.train_on == "all" and run.train_roles != ("assistant",):
        yield "train_roles chooses turns, but train_on 'all' learns everything; leave one of them out"
    if not run.train_roles:
        yield "train_roles names no role, so that nothing of a conversation would be learned; the usual one is assistant"
    for name in run.track:
        if name not in trackers():
            yield f"track: unknown tracker {name!r}{suggest(name, trackers())}"
    for name in run.allow:
        if name not in ALLOWED:
            yield f"allow: unknown check {name!r}{suggest(name, ALLOWED)}"
    for check in (_of_method, _of_optimiser):
        try:
            yield from check(run)
        except ConfigError as e:  # an unknown name: nothing else can be said about it
            yield from str(e).splitlines()


def _of_options(owner: str, given: Mapping[str, Any], known: Mapping[str, Parameter]) -> Iterator[str]:
    for name, value in given.items():
        if name not in known:
            yield f"{owner} has no option {name!r}{suggest(name, known)}"
            continue
        try:
            settings.suit(value, known[name].annotation)
        except ValueError as e:
            yield f"{owner}: {name}: {e}"


def _of_method(run: Run) -> Iterator[str]:
    kind = methods.get(run.method)
    known = methods.options_of(kind)
    unsuitable = list(_of_options(f"method {run.method!r}", run.options, known))
    yield from unsuitable
    if "init" in known and not unsuitable:
        try:
            inits.check(run.options.get("init", known["init"].default), run.options.get("init_options"))
        except ConfigError as e:
            yield from str(e).splitlines()
        else:
            yield from _of_start(run, str(run.options.get("init", known["init"].default)))
    for pattern, option in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        if getattr(run, pattern) and option not in known:
            yield f"{pattern} is given, but method {run.method!r} has no {option}"
    if run.method == "full" and run.quantise is not None:
        yield f"quantise {run.quantise!r} keeps the base as codes, which method 'full' cannot train; leave it out, or train an adapter"
    if run.method == "full" and run.cache_frozen:
        yield "cache_frozen keeps what leaves the blocks below the first adapted one, and method 'full' adapts none; leave it out"
    if run.method == "full" and run.untie:
        yield "untie is for adapters, which change one of two tied layers; method 'full' trains the weight that they share; leave it out"


def _of_start(run: Run, init: str) -> Iterator[str]:
    needs = inits.get(init).NEEDS
    if needs == "residual" and run.quantise is None:
        yield f"init {init!r} makes up for what quantisation takes from the base, which is not quantised; add quantise='nf4'"
    if needs == "residual" and run.untie:
        yield f"init {init!r} is for layers that are quantised, and tied ones are not; leave untie out"


def _of_optimiser(run: Run) -> Iterator[str]:
    owner = f"optimiser {run.optimiser!r}"
    unsuitable = list(_of_options(owner, run.optimiser_options, optim.options_of(run.optimiser)))
    yield from unsuitable
    roles = set(methods.get(run.method).roles.values()) if run.method in methods.available() else None
    needed = sorted(optim.get(run.optimiser).needs)
    if roles is not None and not roles.issuperset(needed):
        has = (
            f"has {' and '.join(sorted(roles))} alone"
            if roles
            else "has neither"
            if len(needed) > 1
            else "has none"
        )
        yield f"{owner} works on {' and '.join(needed)}, and method {run.method!r} {has}; use optimiser 'adamw'"
    if not unsuitable:
        try:
            doubts = optim.make(run.optimiser, **run.optimiser_options).doubts
        except ConfigError as e:
            yield f"{owner}: {e}"
        else:
            yield from (
                f"{owner}: {sentence}, or allow {check!r}"
                for check, sentence in doubts.items()
                if check not in run.allow
            )
