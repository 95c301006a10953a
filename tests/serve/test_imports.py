"""Imports of the server: the name alone loads nothing heavy, and serving in process needs no web packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

WEB = ("fastapi", "starlette", "uvicorn", "prometheus_client", "sse_starlette", "openai")


@pytest.mark.parametrize(
    ("module", "without"), [("veneer.serve", ("transformers", "torch", *WEB)), ("veneer.serve.start", WEB)]
)
def test_what_is_not_needed_is_not_loaded(module, without):
    code = f"import sys, {module}; print([n for n in {without} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_name_is_the_function_and_the_folder():
    import veneer
    import veneer.serve.options

    assert callable(veneer.serve) and veneer.serve.options.Options().slots > 0
