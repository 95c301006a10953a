"""One file, one method; the file's name is the method's name."""

from veneer.methods.base.delta import Delta, DenseDelta, FactoredDelta
from veneer.methods.base.factors import Factors, Products
from veneer.methods.base.options import available, build, check_options, get, options_of, takes_stats, unseen
from veneer.methods.base.peft import PeftForm, PeftKind, PeftStored
from veneer.methods.base.stats import Stats

__all__ = [
    "Delta",
    "DenseDelta",
    "FactoredDelta",
    "Factors",
    "PeftForm",
    "PeftKind",
    "PeftStored",
    "Products",
    "Stats",
    "available",
    "build",
    "check_options",
    "get",
    "options_of",
    "takes_stats",
    "unseen",
]
