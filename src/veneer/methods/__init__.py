"""One file, one method; the file's name is the method's name."""

from veneer.methods.base import Delta, Factors, PeftForm, available, build, check_options, get, options_of

__all__ = ["Delta", "Factors", "PeftForm", "available", "build", "check_options", "get", "options_of"]
