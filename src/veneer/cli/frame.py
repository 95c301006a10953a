"""Turns every error of a verb into one message on stderr and an exit code.

0 done, 1 failed, 2 wrong usage or configuration, 3 a check failed, 129, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from typer.exceptions import Abort, TyperException

from veneer import disk
from veneer.errors import PEERS, VeneerError, in_flags
from veneer.foreign import visible

# Optional packages, and the extra of Veneer that brings each.
EXTRAS = {
    "transformers": "text",
    "tokenizers": "text",
    "yaml": "cli",
    "matplotlib": "plots",
    "datasets": "data",
    "pyarrow": "data",
    "lm_eval": "eval",
    "sklearn": "metrics",
    "sacrebleu": "metrics",
    "rouge_score": "metrics",
    "optuna": "compare",
}

STOPPED = 130


@dataclass
class State:
    """State of one call, which verbs may change."""

    debug: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (sys.argv unless given) and returns its exit code."""
    from veneer.cli.app import app

    state = State(debug=os.environ.get("VENEER_DEBUG", "0") not in ("", "0"))
    try:
        outcome = app(args=arguments, prog_name="veneer", standalone_mode=False, obj=state)
        if outcome == STOPPED:  # what typer makes of Ctrl-C where nothing was to be saved
            print("stopped", file=sys.stderr)
        return outcome if isinstance(outcome, int) else 0
    except Exception as e:
        if state.debug:
            traceback.print_exc()
        message, code = explain(e)
        print(visible(f"error: {message}"), file=sys.stderr)
        return code


def explain(e: Exception) -> tuple[str, int]:
    """Returns the message for the user, and the exit code."""
    if isinstance(e, VeneerError):
        return in_flags(e.text), e.exit_code
    if isinstance(e, TyperException):
        context = getattr(e, "ctx", None)
        path = context.command_path if context else "veneer"
        return f"{_usage(e)}\nsee {path} --help", e.exit_code
    if isinstance(e, Abort):
        return "stopped", STOPPED
    package = (e.name or "").partition(".")[0] if isinstance(e, ModuleNotFoundError) else ""
    if package in EXTRAS:
        return f"this needs the package {package!r}: pip install 'veneer[{EXTRAS[package]}]'", 2
    if (message := disk.named(e)) is not None:
        return message, 1
    where = traceback.extract_tb(e.__traceback__)[-1]
    place = f"{os.path.basename(where.filename)}, line {where.lineno}"
    return f"{type(e).__name__} in {place}: {e}\nunexpected error; rerun with --debug for the traceback", 1


def _usage(e: TyperException) -> str:
    """Returns the message of wrong usage, with our name for a flag of another program's."""
    given, context = getattr(e, "option_name", None), getattr(e, "ctx", None)
    if given is None or context is None:
        return e.format_message()
    flags = {o.lstrip("-").replace("-", "_") for p in context.command.params for o in p.opts}
    ours = PEERS.get(given.lstrip("-").replace("-", "_"), "")
    if ours not in flags:
        return e.format_message()
    return f"No such option: {given}; it is called --{ours.replace('_', '-')} here"
