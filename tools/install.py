"""Creates a virtual environment with Veneer: python3 tools/install.py .venv [extras, with commas]

The demo needs few packages (DEMO); tests, documentation and checks need all (EXTRAS). pip's output is shown
only where it fails.

PyPI's Linux builds of PyTorch include gigabytes of CUDA libraries. On Linux without an NVIDIA GPU, the
version is requested with the local label "+cpu", which only CPU builds have, so that pip cannot install a
CUDA build. The configured indexes are tried first, then PyTorch's CPU index (PyPI lacks this label; a mirror
or a wheel folder may have it). With a GPU, and on other systems, the plain version is correct.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DEMO, EXTRAS = "text,cli,plots", "all,test,dev,docs"
QUIET = ["--quiet", "--no-input", "--progress-bar", "off"]
ROOT = Path(__file__).resolve().parent.parent


def main(folder: Path, extras: str = EXTRAS) -> None:
    begun = time.time()
    if sys.version_info < (3, 10):
        sys.exit(
            "Python must be 3.10 or newer, got %d.%d; name another one, e.g. make PYTHON=python3.12"
            % sys.version_info[:2]
        )
    run(
        [sys.executable, "-m", "venv", str(folder)],
        "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv",
    )
    python = str(folder / "bin" / "python")
    say("installing PyTorch and Veneer with %s into %s; this takes a few minutes" % (extras, folder))
    wanted = os.environ.get("TORCH", "")
    if not any(install(python, arguments) for arguments in choices(pinned_torch(), wanted, is_cpu_only())):
        sys.exit(
            f"no CPU build of torch {pinned_torch()} for this Python, neither on pip's indexes nor on"
            f" {CPU_INDEX};"
            f" name a version to install, e.g. make TORCH=torch=={pinned_torch()}"
        )
    run(
        [python, "-m", "pip", "install", *QUIET, "-e", f"{ROOT}[{extras}]"],
        "installing failed; see pip's message above",
    )
    say("installed %d MB in %d s" % (megabytes(folder), time.time() - begun))


def megabytes(folder: Path) -> int:
    """Returns the size of all files of a folder, in millions of bytes."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    return sum(p.stat().st_size for p in files) // 10**6


def say(sentence: str) -> None:
    """Prints a sentence on stderr."""
    print(sentence, file=sys.stderr, flush=True)


def choices(version: str, wanted: str, cpu_only: bool) -> "list[list[str]]":
    """Returns pip's arguments to try for PyTorch, in order; `wanted` is the user's requirement, or ""."""
    if wanted or not cpu_only:
        return [[wanted or f"torch=={version}"]]
    labelled = f"torch=={version}+cpu"
    return [[labelled], ["--extra-index-url", CPU_INDEX, "--retries", "1", "--timeout", "30", labelled]]


def is_cpu_only() -> bool:
    """Returns True on Linux without a working NVIDIA GPU."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return (
            subprocess.run(
                ["nvidia-smi", "-L"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ).returncode
            != 0
        )
    except OSError:
        return True


def pinned_torch() -> str:
    """Returns the version of PyTorch that Veneer was tested with."""
    found = re.search(
        r"^torch==([\w.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    if found is None:
        sys.exit("constraints.txt must name torch==VERSION")
    return found.group(1)


def install(python: str, arguments: "list[str]") -> bool:
    """Returns True if pip installed this, False if the version is missing; exits on any other error."""
    command = [python, "-m", "pip", "install", *QUIET, *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode and "No matching distribution" not in done.stderr:
        sys.exit(done.stderr)
    return done.returncode == 0


def run(command: "list[str]", otherwise: str) -> None:
    """Runs the command in silence; shows its output, and stops with the advice, if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        say(done.stdout)
        sys.exit(otherwise)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".venv"), *sys.argv[2:3])
