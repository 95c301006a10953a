"""Looks for adapters under a root folder, again and again: new ones, changed ones, and those that went."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from veneer.serve.adapters import reading
from veneer.serve.adapters.expression import NAME
from veneer.serve.adapters.reading import Stamp
from veneer.serve.adapters.registry import Registry
from veneer.serve.errors import RequestError

log = logging.getLogger("veneer.serve")
RUN = "adapter"  # the folder in a run's folder that holds its adapter


class Watcher:
    """Keeps a registry as the root folder is. A change counts once two looks in a row found the same
    files.
    """

    def __init__(self, registry: Registry, root: Path, seconds: float) -> None:
        self.registry, self.root, self.seconds = registry, root, seconds
        self.seen: dict[str, Stamp] = {}
        self.ending = threading.Event()
        self.thread: threading.Thread | None = None

    def folders(self) -> dict[str, Path]:
        """Returns the adapters' folders by name; a run's folder stands for the adapter in it."""
        found: dict[str, Path] = {}
        resolved = self.root.resolve()
        for path in sorted(self.root.iterdir()):
            own = path / RUN if (path / RUN).is_dir() else path
            inside = own.is_dir() and own.resolve().is_relative_to(resolved)
            if inside and NAME.fullmatch(path.name) and reading.is_adapter(own):
                found[path.name] = own
        return found

    def look(self, *, first: bool = False) -> None:
        """One look at the root."""
        found = self.folders()
        for name, folder in found.items():
            stamp = reading.stamp(folder)
            steady = first or self.seen.get(name) == stamp
            self.seen[name] = stamp
            if steady:
                self._meet(name, folder, stamp)
        for name in [n for n in self.seen if n not in found]:
            del self.seen[name]
            self._part(name)

    def _meet(self, name: str, folder: Path, stamp: Stamp) -> None:
        entry = self.registry.entries.get(name)
        if entry is None:
            try:
                self.registry.add(name, folder, stamp=stamp)
            except RequestError as e:
                log.warning("adapter %s: %s", name, e)
        elif entry.folder == folder and entry.stamp != stamp:
            entry.stamp, entry.failure = stamp, None
            if entry.version is not None:
                self.registry.reload(entry)

    def _part(self, name: str) -> None:
        entry = self.registry.entries.get(name)
        if entry is not None and entry.folder is not None and not reading.is_adapter(entry.folder):
            self.registry.unload(name)

    def start(self) -> None:
        """Looks every `seconds` from now on, on a thread of its own."""
        self.thread = threading.Thread(target=self._run, name="veneer-watcher", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.ending.wait(self.seconds):
            try:
                self.look()
            except OSError as e:
                log.warning("adapters: %s", e)

    def close(self) -> None:
        """Ends the looks."""
        self.ending.set()
        if self.thread is not None:
            self.thread.join()
