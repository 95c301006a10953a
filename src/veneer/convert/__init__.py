"""Adapters and run configurations of other programs: read into one common form and written from it."""

from veneer.convert.base import Base
from veneer.convert.carry import READERS, WRITERS, read, write
from veneer.convert.detect import detect
from veneer.convert.pairs import Pair, Pairs

__all__ = ["READERS", "WRITERS", "Base", "Pair", "Pairs", "detect", "read", "write"]
