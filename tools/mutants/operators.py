"""The kinds of fault: each takes a node of the syntax tree and yields what could stand there by mistake.

None is tried on texts: what "a" + "b" would become shows nothing but a TypeError.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

Operator = Callable[[ast.AST], Iterator[ast.AST]]

TRANSPOSED = ("T", "mT")
TRANSPOSES = ("t", "transpose")
# Calls whose first two arguments may change places, or where that is a TypeError and nothing else.
ORDERLESS = ("getattr", "isinstance", "issubclass", "max", "maximum", "min", "minimum", "setattr")
OPPOSITES: dict[str, str] = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "amin": "amax",
    "amax": "amin",
}
LESSER = ("abs", "sqrt", "square")  # methods without which a number has another size
TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


def sign(node: ast.AST) -> Iterator[ast.AST]:
    """a + b <-> a - b, -a -> a, a += b <-> a -= b."""
    if (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Add | ast.Sub)
        and not _textual(node)
        and not _many(node.left, node.right)
    ):
        yield ast.BinOp(node.left, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    elif (
        isinstance(node, ast.AugAssign)
        and isinstance(node.op, ast.Add | ast.Sub)
        and not _textual(node.value)
        and not _many(node.value)
    ):
        yield ast.AugAssign(node.target, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.value)


def transpose(node: ast.AST) -> Iterator[ast.AST]:
    """x.mT, x.T, x.t() or x.transpose(..) -> x, and a @ b -> a.mT @ b or a @ b.mT."""
    if _is_transposed(node):
        yield node.func.value if isinstance(node, ast.Call) else node.value  # type: ignore[attr-defined]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        if not _is_transposed(node.left):
            yield ast.BinOp(ast.Attribute(node.left, "mT", ast.Load()), node.op, node.right)
        if not _is_transposed(node.right):
            yield ast.BinOp(node.left, node.op, ast.Attribute(node.right, "mT", ast.Load()))


def term(node: ast.AST) -> Iterator[ast.AST]:
    """a + b -> a or b, a - b -> a or -b, a and b -> a or b."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub) and not _textual(node):
        yield node.left
        yield node.right if isinstance(node.op, ast.Add) else ast.UnaryOp(ast.USub(), node.right)
    elif isinstance(node, ast.BoolOp):
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def scale(node: ast.AST) -> Iterator[ast.AST]:
    """a * b -> a, b or a / b; a / b -> a or a * b; a ** b, a.square(), a.sqrt(), a.abs() -> a; a number twice as large."""
    if (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult | ast.Div)
        and not _textual(node)
        and not _is_path(node)
    ):
        yield node.left
        if isinstance(node.op, ast.Mult):
            yield node.right
        yield ast.BinOp(node.left, ast.Div() if isinstance(node.op, ast.Mult) else ast.Mult(), node.right)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        yield node.left
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in LESSER
        and not node.args
    ):
        yield node.func.value
    elif isinstance(node, ast.Constant) and type(node.value) is float and node.value:
        yield ast.Constant(2 * node.value)


def off_by_one(node: ast.AST) -> Iterator[ast.AST]:
    """A whole number, the end of a slice or of a range, one higher or lower."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Slice):
        yield from (ast.Slice(moved, node.upper, node.step) for moved in _moved(node.lower))
        yield from (ast.Slice(node.lower, moved, node.step) for moved in _moved(node.upper))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        for i, argument in enumerate(node.args):
            for moved in _moved(argument):
                yield ast.Call(node.func, [*node.args[:i], moved, *node.args[i + 1 :]], node.keywords)


def swap(node: ast.AST) -> Iterator[ast.AST]:
    """f(a, b) -> f(b, a); a - b, a / b, a @ b -> the other way round."""
    if (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Sub | ast.Div | ast.MatMult)
        and not _is_path(node)
    ):
        yield ast.BinOp(node.right, node.op, node.left)
    elif isinstance(node, ast.Call) and len(node.args) > 1 and _name(node.func) not in ORDERLESS:
        first, second, *rest = node.args
        if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
            yield ast.Call(node.func, [second, first, *rest], node.keywords)


def comparison(node: ast.AST) -> Iterator[ast.AST]:
    """< <-> <=, > <-> >=, == <-> !=, is <-> is not, in <-> not in."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield ast.Compare(
                node.left, [*node.ops[:i], TURNED[type(op)](), *node.ops[i + 1 :]], node.comparators
            )


def condition(node: ast.AST) -> Iterator[ast.AST]:
    """if a -> if not a, a while, a choice and a filter likewise; a and b <-> a or b."""
    if isinstance(node, ast.IfExp):
        yield ast.IfExp(_negated(node.test), node.body, node.orelse)
    elif isinstance(node, ast.If):
        yield ast.If(_negated(node.test), node.body, node.orelse)
    elif isinstance(node, ast.While):
        yield ast.While(_negated(node.test), node.body, node.orelse)
    elif isinstance(node, ast.comprehension):
        for i, test in enumerate(node.ifs):
            yield ast.comprehension(
                node.target, node.iter, [*node.ifs[:i], _negated(test), *node.ifs[i + 1 :]], node.is_async
            )
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)


def truth(node: ast.AST) -> Iterator[ast.AST]:
    """True <-> False."""
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)


def extreme(node: ast.AST) -> Iterator[ast.AST]:
    """min <-> max, any <-> all."""
    if isinstance(node, ast.Call) and (name := _name(node.func)) in OPPOSITES:
        function = node.func
        other = OPPOSITES[name]
        turned = (
            ast.Attribute(function.value, other, ast.Load())
            if isinstance(function, ast.Attribute)
            else ast.Name(other, ast.Load())
        )
        yield ast.Call(turned, node.args, node.keywords)


def statement(node: ast.AST) -> Iterator[ast.AST]:
    """A call for its effect, or a += b, that is forgotten."""
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()


OPERATORS: dict[str, Operator] = {
    "sign": sign,
    "transpose": transpose,
    "term": term,
    "scale": scale,
    "off-by-one": off_by_one,
    "swap": swap,
    "comparison": comparison,
    "condition": condition,
    "truth": truth,
    "extreme": extreme,
    "statement": statement,
}


def _name(function: ast.expr) -> str:
    """The last part of what is called: torch.cat -> cat."""
    return (
        function.attr
        if isinstance(function, ast.Attribute)
        else function.id
        if isinstance(function, ast.Name)
        else ""
    )


def _is_transposed(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in TRANSPOSES
    return isinstance(node, ast.Attribute) and node.attr in TRANSPOSED


def _textual(node: ast.AST) -> bool:
    """Whether this is plainly a text, or a sum with one."""
    if isinstance(node, ast.BinOp):
        return _textual(node.left) or _textual(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _many(*nodes: ast.AST) -> bool:
    """Whether one of these is plainly a collection, from which nothing can be subtracted."""
    return any(
        isinstance(
            n, ast.List | ast.ListComp | ast.Tuple | ast.IfExp | ast.Set | ast.SetComp | ast.GeneratorExp
        )
        for n in nodes
    )


def _is_path(node: ast.BinOp) -> bool:
    """Whether this is plainly folder / name, which is written with / but is no number."""
    last = _name(node.right)
    return isinstance(node.op, ast.Div) and (
        (last.isupper() and len(last) > 2) or last == "name" or "Path(" in ast.unparse(node.left)
    )


def _moved(end: ast.expr | None) -> Iterator[ast.expr]:
    """end + 1 and end - 1, unless it is a number, which is moved itself, or none."""
    inner = end.operand if isinstance(end, ast.UnaryOp) else end
    if end is not None and not isinstance(inner, ast.Constant):
        yield ast.BinOp(end, ast.Add(), ast.Constant(1))
        yield ast.BinOp(end, ast.Sub(), ast.Constant(1))


def _negated(test: ast.expr) -> ast.expr:
    return (
        test.operand
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        else ast.UnaryOp(ast.Not(), test)
    )
