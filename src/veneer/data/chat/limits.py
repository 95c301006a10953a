"""Renders chat templates under limits: a template comes with a model or a file, and is a program.

Its sandbox (jinja2's) keeps it from files and processes, not from loops without an end or texts of any size.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from veneer.errors import DataError

SECONDS = 10.0  # for one rendering; usual ones take milliseconds
BYTES = 2 << 30  # by which the process may grow while a template renders
SIZE = 1 << 20  # characters of a template
EVERY = 0.05  # seconds between two looks
ARRIVES = 100  # passes of a loop; a raised exception arrives in the first one
COUNTS = {"length", "count", "int", "float", "round", "abs"}  # filters that give numbers


class Exceeded(BaseException):
    """A template took too long or wrote too much; not an Exception, which a template's caller may catch."""


@contextmanager
def limited(template: Any) -> Iterator[None]:
    """Ends the rendering within the block when it exceeds the limits. Raises DataError."""
    for text in template.values() if isinstance(template, dict) else [template]:
        if isinstance(text, str) and (reason := problem(text)):
            raise DataError(f"the chat template {reason}; give another one")
    watch = _watch(os.getpid())
    try:
        with watch.looking():
            yield
    except Exceeded:
        raise DataError(
            f"the chat template takes too long (over {SECONDS:g} s) or too much memory; give another one"
        ) from None


@lru_cache(maxsize=64)
def problem(template: str) -> str | None:
    """Returns the reason why a template cannot be rendered under limits, or None."""
    if len(template) > SIZE:
        return f"must be at most {SIZE:,} characters, got {len(template):,}"
    from jinja2 import Environment, TemplateError, nodes

    try:
        plain = template.replace("generation", "if true").replace("endif true", "endif")
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except (TemplateError, RecursionError):
        return None  # the renderer says why
    found: Any = tree.find_all((nodes.Mul, nodes.Pow))
    for node in found:
        if isinstance(node, nodes.Pow) or not (_is_number(node.left) and _is_number(node.right)):
            return f"multiplies texts or takes powers (line {node.lineno}), which may fill the memory"
    return None


def _is_number(node: Any) -> bool:
    """Tells if an expression is a small number by its form: a constant, a count, or a sum of such."""
    from jinja2 import nodes

    if isinstance(node, nodes.Const):
        return isinstance(node.value, int | float) and abs(node.value) <= 1 << 20
    if isinstance(node, nodes.Filter):
        return node.name in COUNTS
    if isinstance(node, nodes.Getattr):
        return isinstance(node.node, nodes.Name) and node.node.name == "loop"
    if isinstance(node, nodes.BinExpr):
        return not isinstance(node, nodes.Pow) and _is_number(node.left) and _is_number(node.right)
    return isinstance(node, nodes.Neg) and _is_number(node.node)


class _Watch:
    """A thread that raises `Exceeded` in threads whose rendering exceeds the limits."""

    def __init__(self) -> None:
        self.lock, self.begun = threading.Lock(), threading.Event()
        self.deadlines: dict[int, tuple[float, int]] = {}
        self.raised: set[int] = set()
        threading.Thread(target=self._look, daemon=True).start()

    @contextmanager
    def looking(self) -> Iterator[None]:
        me = threading.get_ident()
        if me in self.deadlines:  # a rendering within another
            yield
            return
        self.deadlines[me] = (time.monotonic() + SECONDS, 0)
        self.begun.set()
        try:
            yield
        finally:
            self._end(me)

    def _end(self, me: int) -> None:
        """Ends the thread's deadline, and takes in an `Exceeded` that is still on its way.

        It must arrive: taking it back leaves the interpreter's flag of waiting exceptions set, and CPython
        3.11 then never enters a function under a tracer.
        """
        try:
            self._forget(me)
            for _ in range(ARRIVES):
                pass
        except Exceeded:
            self._forget(me)

    def _forget(self, me: int) -> None:
        with self.lock:
            self.deadlines.pop(me, None)
            self.raised.discard(me)

    def _look(self) -> None:
        while True:
            self.begun.wait()
            self.begun.clear()
            while self.deadlines:
                time.sleep(EVERY)
                with self.lock:
                    for thread, (end, before) in list(self.deadlines.items()):
                        size = _size()
                        if not before:
                            self.deadlines[thread] = (end, size or 1)
                        elif (time.monotonic() > end or size - before > BYTES) and thread not in self.raised:
                            self.raised.add(thread)
                            _raise(thread)


def _raise(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Exceeded))


def _size() -> int:
    """Returns the bytes of memory that this process holds, or 0 where Linux does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


@lru_cache(maxsize=1)
def _watch(process: int) -> _Watch:
    """Returns the watch of this process; threads do not survive a fork."""
    return _Watch()
