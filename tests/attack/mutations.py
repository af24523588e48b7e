"""The mutants of a module: its source with one small thing changed, as somebody might have got it wrong.

Not changed are texts, annotations, decorators, assertions, and what stands in a `raise`.
Leaves to others: whether the tests notice (`mutants`). Read more: docs/mutants.md.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Final, TypeAlias

Mutation: TypeAlias = tuple[ast.expr | ast.stmt, ast.AST]
"""A part of a module's syntax, and what stands there instead."""

COMPARED: Final[dict[type[ast.AST], tuple[type[ast.cmpop], ...]]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
SUMS: Final[dict[type[ast.AST], type[ast.operator]]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.Pow: ast.Mult,
}  # fmt: skip
TWINS: Final = {"min": "max", "minimum": "maximum", "any": "all", "argmin": "argmax", "floor": "ceil"}
TWIN: Final = TWINS | {right: left for left, right in TWINS.items()}
QUIET: Final = {"annotation", "returns", "decorator_list", "exc", "cause", "bases"}
"""Parts of a statement that are not mutated: annotations, decorators, what a `raise` raises."""


def mutations(node: ast.AST) -> Iterator[Mutation]:
    """Yield what can be changed directly in a node."""
    for kind in (_comparisons, _sums, _values, _conditions, _jumps, _calls, _bounds, _statements):
        yield from kind(node)


def _comparisons(node: ast.AST) -> Iterator[Mutation]:
    match node:
        case ast.Compare(left, ops, right):
            for i, op in enumerate(ops):
                for other in COMPARED[type(op)]:
                    yield node, ast.Compare(left, [*ops[:i], other(), *ops[i + 1 :]], right)
        case ast.BoolOp(op, values):
            yield node, ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)


def _sums(node: ast.AST) -> Iterator[Mutation]:
    match node:
        case ast.BinOp(left, op, right) if type(op) in SUMS and not (_is_text(left) or _is_text(right)):
            yield node, ast.BinOp(left, SUMS[type(op)](), right)
        case ast.AugAssign(target, op, value) if type(op) in SUMS:
            yield node, ast.AugAssign(target, SUMS[type(op)](), value)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield node, operand


def _values(node: ast.AST) -> Iterator[Mutation]:
    match node:
        case ast.Constant(bool() as value):
            yield node, ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield from ((node, ast.Constant(other)) for other in {value + 1, 0} - {value})
        case ast.Return(ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield value, ast.Constant(None)


def _conditions(node: ast.AST) -> Iterator[Mutation]:
    match node:
        case ast.If(test) | ast.IfExp(test):
            yield from ((test, ast.Constant(forced)) for forced in (True, False))
        case ast.While(test):
            yield test, ast.Constant(value=False)
        case ast.comprehension(ifs=[test]):
            yield test, ast.Constant(value=True)


def _jumps(node: ast.AST) -> Iterator[Mutation]:
    match node:
        case ast.Break():
            yield node, ast.Continue()
        case ast.Continue():
            yield node, ast.Break()


def _calls(node: ast.AST) -> Iterator[Mutation]:
    match node:
        case ast.Call(ast.Name(name) as function) if name in TWIN:
            yield function, ast.Name(TWIN[name])
        case ast.Call(ast.Attribute(of, name) as function) if name in TWIN:
            yield function, ast.Attribute(of, TWIN[name])
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg is not None:
                yield node, ast.Call(node.func, node.args, [other for other in node.keywords if other is not keyword])


def _bounds(node: ast.AST) -> Iterator[Mutation]:
    if isinstance(node, ast.Slice):
        if node.lower is not None:
            yield node, ast.Slice(None, node.upper, node.step)
        if node.upper is not None:
            yield node, ast.Slice(node.lower, None, node.step)
            yield node.upper, ast.BinOp(node.upper, ast.Add(), ast.Constant(1))


def _statements(node: ast.AST) -> Iterator[Mutation]:
    match node:
        case ast.Raise() | ast.Expr(ast.Call()):
            yield node, ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign(ast.Attribute() | ast.Subscript()):
            yield node, ast.Pass()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and all its parts, in order, without those that are not mutated."""
    yield node
    for field, value in ast.iter_fields(node):
        for part in value if isinstance(value, list) else [value]:
            if field not in QUIET and isinstance(part, ast.AST) and not isinstance(part, (ast.JoinedStr, ast.Assert)):
                yield from _parts(part)


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self._new if node is self._old else self.generic_visit(node)


@dataclass(frozen=True)
class Mutant:
    """A module's source with one thing changed: the number of the change, the line, from what to what."""

    number: int
    line: int
    before: str
    after: str
    source: str


def draw(source: str, sample: int, rng: Random) -> list[Mutant]:
    """Return up to `sample` different mutants of a source; a larger sample begins with the smaller one."""
    drawn = []
    numbers = list(range(len(_all_mutations(ast.parse(source)))))
    rng.shuffle(numbers)
    for number in numbers[:sample]:
        tree = ast.parse(source)  # a tree of its own, since it is changed
        old, new = _all_mutations(tree)[number]
        mutated = ast.unparse(ast.fix_missing_locations(_Swap(old, new).visit(tree)))
        drawn.append(Mutant(number, old.lineno, ast.unparse(old), ast.unparse(new), mutated))
    return drawn


def _all_mutations(tree: ast.AST) -> list[Mutation]:
    return [mutation for node in _parts(tree) for mutation in mutations(node)]
