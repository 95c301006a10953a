"""The command `veneer`, also as python -m veneer."""

from __future__ import annotations

import sys

from veneer import signals


def main() -> int:
    """Runs the command line; says what is missing where only the library is installed.

    A signal ends it with one line and 128 + its number, wherever it is.
    """
    signals.at_once()
    try:
        return _run()
    except signals.Stopped as e:
        print(f"stopped by signal {e.number}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _run() -> int:
    try:
        from veneer.cli.frame import main as run
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        print(
            f"error: the command line needs the package {package!r}: pip install 'veneer[cli]'",
            file=sys.stderr,
        )
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
