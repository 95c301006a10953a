"""One file, one method; the file's name is the method's name."""

from veneer.methods.base.delta import Delta, Factors, Stats
from veneer.methods.base.options import available, build, check_options, get, options_of, takes_stats, unseen
from veneer.methods.base.peft import PeftForm

__all__ = [
    "Delta",
    "Factors",
    "PeftForm",
    "Stats",
    "available",
    "build",
    "check_options",
    "get",
    "options_of",
    "takes_stats",
    "unseen",
]
