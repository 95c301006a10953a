"""One file, one method; the file's name is the method's name."""

from veneer.methods.base import Delta, Factors, PeftForm, Stats, available, build, check_options, get, options_of, takes_stats, unseen

__all__ = ["Delta", "Factors", "PeftForm", "Stats", "available", "build", "check_options", "get", "options_of", "takes_stats", "unseen"]
