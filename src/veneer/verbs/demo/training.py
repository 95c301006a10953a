"""Trains for a demo; its errors name what a demo's user can do."""

from __future__ import annotations

import re

from veneer.errors import ConfigError, option
from veneer.runs.fit import fit
from veneer.runs.shared import Shared
from veneer.train.errors import Interrupted
from veneer.train.folder.result import Result
from veneer.train.run import Run


def trained(run: Run, *, progress: bool, shared: Shared | None = None) -> Result:
    """Returns the result of a training, or of its finished folder. Raises the errors of `fit`.

    shared: with the demo's other trainings.
    """
    try:
        return fit(run, progress=progress, shared=shared)
    except ConfigError as e:
        ours = re.sub(r", or pass [^\n]*$", "", e.text)  # a demo has no flag for it
        raise ConfigError(f"{ours}\nor remove an earlier demo's files by {option('fresh', True)}") from e
    except Interrupted as e:  # a demo resumes by itself
        again = e.text.replace(option("resume", True), "the same command")
        raise Interrupted(again, e.exit_code - 128) from None
