"""Adapters in RAM: kept while there is room, read from the disk again when a request needs them."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from veneer.serve.adapters.reading import Reader
from veneer.serve.adapters.version import Version
from veneer.serve.errors import BrokenAdapter

log = logging.getLogger("veneer.serve")


class Memory:
    """Normal forms in RAM, at most `limit` bytes beside those that requests wait for, least recently used
    first out.
    """

    def __init__(
        self, reader: Reader, loader: ThreadPoolExecutor, limit: int, ready: Callable[[], None]
    ) -> None:
        """ready: called when a version's forms are back."""
        self.reader, self.loader, self.limit, self.ready = reader, loader, limit, ready
        self.held: OrderedDict[int, Version] = OrderedDict()
        self.fetching: set[int] = set()
        self.lock = threading.Lock()

    def keep(self, version: Version) -> None:
        """Notes that a version's forms are in RAM, and lets go of the least recently used ones that nobody
        waits for.
        """
        with self.lock:
            self.held[id(version)] = version
            self.held.move_to_end(id(version))
            total = sum(v.bytes for v in self.held.values())
            for v in list(self.held.values()):
                if total <= self.limit:
                    break
                if v is not version and not v.holds and v.folder is not None:
                    v.forms = None
                    del self.held[id(v)]
                    total -= v.bytes

    def touch(self, versions: Iterable[Version]) -> None:
        """Notes a use."""
        with self.lock:
            for v in versions:
                if id(v) in self.held:
                    self.held.move_to_end(id(v))

    def fetch(self, version: Version) -> None:
        """Starts to read a version's forms from the disk again, once."""
        with self.lock:
            if id(version) in self.fetching:
                return
            self.fetching.add(id(version))
        self.loader.submit(self._fetch, version)

    def _fetch(self, version: Version) -> None:
        try:
            assert version.folder is not None
            read = self.reader.read(version.folder)
            if read.content != version.content:
                raise BrokenAdapter("its files are others than those it was loaded from; load it again")
            version.forms = read.forms
            self.keep(version)
        except Exception as e:
            version.error = f"adapter {version.name!r} could not be read again: {type(e).__name__}"
            log.warning("adapter %s: %s", version.name, e)
        finally:
            with self.lock:
                self.fetching.discard(id(version))
            self.ready()

    def drop(self, version: Version) -> None:
        """Takes a version off the list."""
        with self.lock:
            self.held.pop(id(version), None)

    @property
    def bytes(self) -> int:
        """Bytes of all forms in RAM."""
        with self.lock:
            return sum(v.bytes for v in self.held.values())
