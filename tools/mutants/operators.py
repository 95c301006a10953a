"""Kinds of faults: each takes a node of the syntax tree and yields nodes that could stand there by mistake.

Texts are excluded, because changing "a" + "b" only gives a TypeError.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from mutants.nodes import called, has_collection, is_path, is_text, is_transposed, moved, negated

Operator = Callable[[ast.AST], Iterator[ast.AST]]

# Calls in which swapping the first two arguments changes nothing or gives a TypeError.
ORDERLESS = ("getattr", "isinstance", "issubclass", "max", "maximum", "min", "minimum", "setattr")
OPPOSITES: dict[str, str] = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "amin": "amax",
    "amax": "amin",
}
LESSER = ("abs", "sqrt", "square")  # methods whose removal changes the size of a number
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
        and not is_text(node)
        and not has_collection(node.left, node.right)
    ):
        yield ast.BinOp(node.left, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    elif (
        isinstance(node, ast.AugAssign)
        and isinstance(node.op, ast.Add | ast.Sub)
        and not is_text(node.value)
        and not has_collection(node.value)
    ):
        yield ast.AugAssign(node.target, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.value)


def transpose(node: ast.AST) -> Iterator[ast.AST]:
    """x.mT, x.T, x.t() or x.transpose(..) -> x, and a @ b -> a.mT @ b or a @ b.mT."""
    if is_transposed(node):
        yield node.func.value if isinstance(node, ast.Call) else node.value  # type: ignore[attr-defined]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        if not is_transposed(node.left):
            yield ast.BinOp(ast.Attribute(node.left, "mT", ast.Load()), node.op, node.right)
        if not is_transposed(node.right):
            yield ast.BinOp(node.left, node.op, ast.Attribute(node.right, "mT", ast.Load()))


def term(node: ast.AST) -> Iterator[ast.AST]:
    """a + b -> a or b, a - b -> a or -b, a and b -> a or b."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub) and not is_text(node):
        yield node.left
        yield node.right if isinstance(node.op, ast.Add) else ast.UnaryOp(ast.USub(), node.right)
    elif isinstance(node, ast.BoolOp):
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def scale(node: ast.AST) -> Iterator[ast.AST]:
    """a * b -> a, b or a / b; a / b -> a or a * b; a ** b, a.sqrt(), a.abs() -> a; doubles a number."""
    if (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult | ast.Div)
        and not is_text(node)
        and not is_path(node)
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
    """Shifts an integer, the end of a slice or the end of a range by one."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Slice):
        yield from (ast.Slice(end, node.upper, node.step) for end in moved(node.lower))
        yield from (ast.Slice(node.lower, end, node.step) for end in moved(node.upper))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        for i, argument in enumerate(node.args):
            for end in moved(argument):
                yield ast.Call(node.func, [*node.args[:i], end, *node.args[i + 1 :]], node.keywords)


def swap(node: ast.AST) -> Iterator[ast.AST]:
    """f(a, b) -> f(b, a); swaps the operands of a - b, a / b, a @ b."""
    if (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Sub | ast.Div | ast.MatMult)
        and not is_path(node)
    ):
        yield ast.BinOp(node.right, node.op, node.left)
    elif isinstance(node, ast.Call) and len(node.args) > 1 and called(node.func) not in ORDERLESS:
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
    """if a -> if not a, also in while, conditional expressions and filters; a and b <-> a or b."""
    if isinstance(node, ast.IfExp):
        yield ast.IfExp(negated(node.test), node.body, node.orelse)
    elif isinstance(node, ast.If):
        yield ast.If(negated(node.test), node.body, node.orelse)
    elif isinstance(node, ast.While):
        yield ast.While(negated(node.test), node.body, node.orelse)
    elif isinstance(node, ast.comprehension):
        for i, test in enumerate(node.ifs):
            yield ast.comprehension(
                node.target, node.iter, [*node.ifs[:i], negated(test), *node.ifs[i + 1 :]], node.is_async
            )
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)


def truth(node: ast.AST) -> Iterator[ast.AST]:
    """True <-> False."""
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)


def extreme(node: ast.AST) -> Iterator[ast.AST]:
    """min <-> max, any <-> all."""
    if isinstance(node, ast.Call) and (name := called(node.func)) in OPPOSITES:
        function = node.func
        other = OPPOSITES[name]
        turned = (
            ast.Attribute(function.value, other, ast.Load())
            if isinstance(function, ast.Attribute)
            else ast.Name(other, ast.Load())
        )
        yield ast.Call(turned, node.args, node.keywords)


def statement(node: ast.AST) -> Iterator[ast.AST]:
    """Removes a call made for its effect, or a += b."""
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
