"""Defines Veneer's errors; a message says where, what is wrong and what to do."""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Marks around a setting and its value in a message: Python and the command line write them differently.
OPEN, EQUALS, CLOSE = "\ue000", "\ue001", "\ue002"
MARKED = re.compile(f"{OPEN}(\\w+)(?:{EQUALS}([^{CLOSE}]*))?{CLOSE}")


class VeneerError(Exception):
    """The base of all errors meant for the user. exit_code: the command line's."""

    exit_code = 1

    @property
    def text(self) -> str:
        """Returns the message with its marks, for a message that contains it."""
        return Exception.__str__(self)

    def __str__(self) -> str:
        return in_python(self.text)


class ConfigError(VeneerError):
    """A setting is unknown or impossible."""

    exit_code = 2


class SiteError(VeneerError):
    """A layer was not found, cannot be adapted, or was never used."""


class ShapeError(VeneerError):
    """Sizes do not fit together."""


class DataError(VeneerError):
    """Training or evaluation text is missing, unreadable or without a label."""


class FormatError(VeneerError):
    """A file is not what it should be, or does not belong to this model."""


class NotFinite(VeneerError):
    """A number that a step needs is infinite or NaN."""


class NotWritten(VeneerError, OSError):
    """A file could not be written: the disk is full or fails."""


class NotMergeable(VeneerError):
    """The change of weights cannot be written into the base, or would not survive there."""

    exit_code = 3


def option(name: str, *value: Any) -> str:
    """Returns a setting for a message, with a value if given: Python reads lr, the command line --lr.

    option("force", True) is force=True or --force, option("allow", "zero") allow='zero' or --allow zero.
    """
    return f"{OPEN}{name}{f'{EQUALS}{value[0]!r}' if value else ''}{CLOSE}"


def in_python(text: str) -> str:
    """Returns the text with settings as Python writes them."""
    return _written(text, lambda name, *value: f"{name}={value[0]!r}" if value else name)


def in_flags(text: str) -> str:
    """Returns the text with settings as the command line writes them."""
    return _written(text, _flag)


def _written(text: str, write: Callable[..., str]) -> str:
    def one(found: re.Match[str]) -> str:
        name, value = found.groups()
        return write(name) if value is None else write(name, ast.literal_eval(value))

    return MARKED.sub(one, text)


def _flag(name: str, *value: Any) -> str:
    word = name.replace("_", "-")
    if not value or value[0] is True:
        return f"--{word}"
    if value[0] is False:
        return f"--no-{word}"
    many = value[0] if isinstance(value[0], tuple | list) else value
    return " ".join(f"--{word} {v:g}" if isinstance(v, float) else f"--{word} {v}" for v in many)


# Names of settings in other programs, and here.
PEERS = {
    theirs: ours
    for ours, names in {
        "accumulate": "gradient_accumulation_steps grad_accum grad_accumulation_steps",
        "alpha": "lora_alpha",
        "batch": "per_device_train_batch_size micro_batch_size batch_size train_batch_size",
        "betas": "adam_betas",
        "clip": "max_grad_norm grad_clip gradient_clipping",
        "compile": "torch_compile",
        "data": "dataset datasets dataset_name train_file train_data",
        "dropout": "lora_dropout",
        "epochs": "num_train_epochs num_epochs n_epochs",
        "eval_every": "eval_steps steps_per_eval",
        "gradient_checkpointing": "activation_checkpointing grad_checkpoint",
        "init": "init_lora_weights",
        "keep": "save_total_limit",
        "label_smoothing": "label_smoothing_factor",
        "length": "max_seq_length max_seq_len sequence_len cutoff_len max_length block_size",
        "loraplus_ratio": "loraplus_lr_ratio",
        "lr": "learning_rate",
        "method": "finetuning_type peft_type",
        "model": "model_name_or_path base_model model_id model_name",
        "optimiser": "optim optimizer",
        "out": "output_dir output save_dir",
        "packing": "sample_packing",
        "precision": "bf16 fp16 mixed_precision",
        "quantise": "quantize load_in_4bit load_in_8bit quantization_bit",
        "rank": "lora_r lora_rank r",
        "resume": "resume_from_checkpoint",
        "save_every": "save_steps",
        "schedule": "lr_scheduler_type lr_scheduler",
        "seed": "random_seed",
        "stabilised": "use_rslora rslora",
        "steps": "max_steps iters num_steps",
        "to": "target_modules lora_target lora_target_modules",
        "track": "report_to",
        "train_on": "train_on_inputs completion_only_loss assistant_only_loss",
        "valid": "eval_dataset validation_file eval_file val_data",
        "neftune": "neftune_noise_alpha neftune_alpha",
        "patience": "early_stopping_patience",
        "warmup": "warmup_ratio warmup_steps num_warmup_steps lr_warmup_steps",
        "weight_decay": "wd",
    }.items()
    for theirs in names.split()
}


def suggest(name: str, known: Iterable[str], *, listed: bool = True) -> str:
    """Returns "; did you mean 'rank'?" for the nearest known name, or the known names (if `listed`)."""
    names = sorted(known)
    ours = PEERS.get(name.lower().replace("-", "_"))
    if ours in names:
        return f"; it is called {ours!r} here"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names) or 'none'}" if listed else ""


def not_finite(options: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each option whose value is infinite or NaN."""
    wild = {n: v for n, v in options.items() if isinstance(v, float) and not math.isfinite(v)}
    return [f"{name} must be a finite number, got {value:g}" for name, value in wild.items()]


def first_few(names: Iterable[str], n: int = 5) -> str:
    """Returns "a, b, c and 12 more", enough of a list to recognise it."""
    every = list(names)
    return ", ".join(every[:n]) + (f" and {len(every) - n} more" if len(every) > n else "")


def listed(problems: Sequence[str], what: str, n: int = 5) -> list[str]:
    """Returns the first problems and a line that counts the rest. what: the word for the place of one."""
    rest = len(problems) - n
    return [*problems[:n], *([f"and {rest} more {what}{'s' if rest > 1 else ''}"] if rest > 0 else [])]
