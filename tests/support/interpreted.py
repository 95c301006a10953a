"""Runs the package's Triton kernel in Triton's interpreter, within a test."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from veneer.ops import fused

KERNEL = "veneer.ops.fused.kernel"


@contextmanager
def interpreted() -> Iterator[Any]:
    """Yields the kernel's module as the interpreter runs it; it is imported anew afterwards."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        forget()
        yield importlib.import_module(KERNEL)
        forget()


def forget() -> None:
    """Has the kernel's module imported anew."""
    sys.modules.pop(KERNEL, None)
    vars(fused).pop("kernel", None)
