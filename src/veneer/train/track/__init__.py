"""Trackers: one file, one library that shows figures of runs; the file's name is the tracker's name."""

from veneer.train.track.base import Tracker, available, check_installed, get
from veneer.train.track.feed import Feed

__all__ = ["Feed", "Tracker", "available", "check_installed", "get"]
