"""Questions about nodes of the syntax tree, and small changes of them, for the operators."""

from __future__ import annotations

import ast
from collections.abc import Iterator

TRANSPOSED = ("T", "mT")
TRANSPOSES = ("t", "transpose")


def called(function: ast.expr) -> str:
    """Returns the last part of the name of a function: "cat" for torch.cat."""
    return (
        function.attr
        if isinstance(function, ast.Attribute)
        else function.id
        if isinstance(function, ast.Name)
        else ""
    )


def is_transposed(node: ast.AST) -> bool:
    """Returns True for x.T, x.mT, x.t() and x.transpose(..)."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in TRANSPOSES
    return isinstance(node, ast.Attribute) and node.attr in TRANSPOSED


def is_text(node: ast.AST) -> bool:
    """Returns True for a literal text, or a sum with one."""
    if isinstance(node, ast.BinOp):
        return is_text(node.left) or is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def has_collection(*nodes: ast.AST) -> bool:
    """Returns True if a node is a literal collection, which does not support subtraction."""
    return any(
        isinstance(
            n, ast.List | ast.ListComp | ast.Tuple | ast.IfExp | ast.Set | ast.SetComp | ast.GeneratorExp
        )
        for n in nodes
    )


def is_path(node: ast.BinOp) -> bool:
    """Returns True for folder / name, which is not a division."""
    last = called(node.right)
    return isinstance(node.op, ast.Div) and (
        (last.isupper() and len(last) > 2) or last == "name" or "Path(" in ast.unparse(node.left)
    )


def moved(end: ast.expr | None) -> Iterator[ast.expr]:
    """Yields end + 1 and end - 1, unless `end` is a number, which is shifted itself, or None."""
    inner = end.operand if isinstance(end, ast.UnaryOp) else end
    if end is not None and not isinstance(inner, ast.Constant):
        yield ast.BinOp(end, ast.Add(), ast.Constant(1))
        yield ast.BinOp(end, ast.Sub(), ast.Constant(1))


def negated(test: ast.expr) -> ast.expr:
    """Returns `not test`, without a double negation."""
    return (
        test.operand
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        else ast.UnaryOp(ast.Not(), test)
    )
