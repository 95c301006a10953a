"""The adapters of a server by name: from unknown to served, and from one content to the next."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.adapt.store.loaded import Loaded
from veneer.errors import VeneerError, suggest
from veneer.serve.adapters import reading
from veneer.serve.adapters.expression import NAME, Named
from veneer.serve.adapters.memory import Memory
from veneer.serve.adapters.reading import Reader, Stamp
from veneer.serve.adapters.slots import Mixture, Slots
from veneer.serve.adapters.version import Forms, Version
from veneer.serve.errors import BrokenAdapter, RequestError, UnknownModel

log = logging.getLogger("veneer.serve")
Prove = Callable[[Version, Loaded], None]
FORGET_FAILURE = 30.0  # seconds until a folder that could not be read is tried again


@dataclass
class Entry:
    """A name. folder: None for adapters given in memory; version: what it stands for, None until it is first
    needed.
    """

    name: str
    folder: Path | None
    version: Version | None = None
    stamp: Stamp = ()
    loading: Future[Version] | None = None
    failure: tuple[str, float] | None = None
    loads: int = 0
    seconds: float = 0.0
    pinned: bool = False
    listed: bool = True


class Registry:
    """Names, versions and their memory. Safe for threads: changes of the bank go through `call` to the
    engine's thread.
    """

    def __init__(
        self,
        reader: Reader,
        slots: Slots,
        call: Callable[[Callable[[], Any]], Future[Any]],
        prove: Prove,
        *,
        base: str,
        memory: int,
    ) -> None:
        """memory: bytes of adapters kept in RAM beside those in the bank. prove: raises if a version does not
        act.
        """
        self.reader, self.slots, self.call, self.prove = reader, slots, call, prove
        self.base = base
        self.entries: dict[str, Entry] = {}
        self.lock = threading.RLock()
        self.loader = ThreadPoolExecutor(1, "veneer-loader")
        self.memory = Memory(reader, self.loader, memory, self._wake)
        self.failures = 0

    def _wake(self) -> None:
        self.call(lambda: None)

    def names(self) -> list[str]:
        """Returns all names, sorted; the place in this list is an adapter's number."""
        with self.lock:
            return sorted(n for n, e in self.entries.items() if e.listed)

    def entry(self, name: str) -> Entry:
        """Returns a name's entry. Raises UnknownModel with the nearest name."""
        with self.lock:
            if name not in self.entries:
                known = [*self.entries, self.base]
                raise UnknownModel(f"model {name!r} is unknown{suggest(name, known)}", param="model")
            return self.entries[name]

    def add(self, name: str, folder: Path, *, stamp: Stamp = ()) -> Entry:
        """Adds a name for a folder, which is read when it is first asked for. Raises RequestError for a name
        that is taken.
        """
        if not NAME.fullmatch(name) or name == self.base:
            raise RequestError(
                "lora_name must be up to 64 letters, digits, '.', '-' and '_', and not the base's,"
                f" got {name!r}",
                param="lora_name",
            )
        with self.lock:
            if name in self.entries:
                raise RequestError(
                    f"adapter {name!r} is already loaded; unload it first, or set load_inplace",
                    code="already_loaded",
                )
            self.entries[name] = entry = Entry(name, folder, stamp=stamp)
        return entry

    def give(self, name: str, forms: Forms, content: str) -> None:
        """Adds an adapter from memory."""
        entry = self.add(name, Path())
        entry.folder = None
        version = Version(name, content, forms, None)
        self._proven(version, None)
        with self.lock:
            entry.version, entry.loads = version, 1

    def resolve(self, named: Named) -> Mixture:
        """Returns the versions of a sum, each with a hold; reads those that were never needed before.

        Raises UnknownModel for a name that does not exist, and BrokenAdapter for a folder that cannot be
        served.
        """
        entries = [(self.entry(n), s) for n, s in named]
        for e, _ in entries:
            if e.version is None:
                self.ensure(e).result()
        with self.lock:
            found = tuple((e.version, s) for e, s in entries if e.version is not None)
            for v, _ in found:
                v.hold()
        return found

    def ensure(self, entry: Entry) -> Future[Version]:
        """Starts to read an entry that has no version. Raises BrokenAdapter if that failed a moment ago."""
        with self.lock:
            if entry.version is not None:
                done: Future[Version] = Future()
                done.set_result(entry.version)
                return done
            if entry.failure is not None and time.monotonic() < entry.failure[1]:
                raise BrokenAdapter(entry.failure[0], param="model")
            if entry.loading is None:
                entry.loading = self.loader.submit(self._load, entry)
            return entry.loading

    def reload(self, entry: Entry) -> Future[Version]:
        """Starts to read an entry's folder again; its present version serves until the new one is proven."""
        with self.lock:
            if entry.loading is None or entry.loading.done():
                entry.loading = self.loader.submit(self._load, entry)
            return entry.loading

    def _load(self, entry: Entry) -> Version:
        """On the loader's thread: reads, proves, publishes."""
        began = time.monotonic()
        assert entry.folder is not None
        try:
            stamp = reading.stamp(entry.folder)
            read = self.reader.read(entry.folder)
            with self.lock:
                now = entry.version
            if now is not None and now.content == read.content:
                entry.stamp = stamp
                return now
            version = Version(entry.name, read.content, read.forms, entry.folder)
            self._proven(version, read.loaded)
        except Exception as e:
            self._failed(entry, e)
            raise BrokenAdapter(self._why(entry, e), param="model") from e
        with self.lock:
            old, entry.version, entry.stamp, entry.failure, entry.loading = (
                entry.version,
                version,
                stamp,
                None,
                None,
            )
            entry.loads, entry.seconds = entry.loads + 1, time.monotonic() - began
            version.pinned = entry.pinned
            gone = self.entries.get(entry.name) is not entry
        for v in [old, version if gone else None]:
            if v is not None:
                self._retire(v)
        log.info("adapter %s: %s in %.2f s", entry.name, read.content[:12], entry.seconds)
        return version

    def _proven(self, version: Version, loaded: Loaded | None) -> None:
        self.memory.keep(version)
        try:
            if loaded is not None:
                self.prove(version, loaded)
        except BaseException:
            self._retire(version)
            raise

    def _failed(self, entry: Entry, e: Exception) -> None:
        with self.lock:
            self.failures += 1
            entry.failure = self._why(entry, e), time.monotonic() + FORGET_FAILURE
            entry.loading = None
        log.warning("adapter %s: %s", entry.name, e)

    def _why(self, entry: Entry, e: Exception) -> str:
        """The reason without paths of the server."""
        text = str(e) if isinstance(e, VeneerError) else f"{type(e).__name__} while it was read"
        for path in {str(entry.folder), str(entry.folder and entry.folder.resolve())}:
            text = text.replace(path, entry.name)
        return f"adapter {entry.name!r} cannot be served: {text}"

    def unload(self, name: str) -> Version | None:
        """Withdraws a name at once; its memory is free when its last request ends."""
        with self.lock:
            entry = self.entry(name)
            del self.entries[name]
            version = entry.version
        if version is not None:
            self._retire(version)
        return version

    def pin(self, name: str, pinned: bool) -> None:
        """Keeps an adapter's place in the bank, or gives it free."""
        with self.lock:
            entry = self.entry(name)
            entry.pinned = pinned
            if entry.version is not None:
                entry.version.pinned = pinned

    def _retire(self, version: Version) -> None:
        self.memory.drop(version)
        self.call(lambda: self._retire_now(version)).result()

    def _retire_now(self, version: Version) -> None:
        self.slots.retire(version)
        if not version.running and not version.holds:
            version.forms = None

    def close(self) -> None:
        """Ends the loader."""
        self.loader.shutdown(wait=True, cancel_futures=True)
