"""The mutants of a module: each is the module with one small fault.

Owns which things, chosen after what goes wrong in code like this: a step left out, a lock or a shield not
taken, a bound off by one, a condition that is not looked at, another answer given. Wording (strings, log
fields), what classes declare, decorators and assertions are left alone. Must not know tests.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COMPARED_AS: dict[type[ast.cmpop], type[ast.cmpop]] = {
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
_COMPUTED_AS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_CALLED_AS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_TAKEN_FOR = {
    "Answer": ("UNBACKED", "CONTENDED"),
    "Access": ("WRITE", "READ"),
    "RegionKind": ("MMIO", "MOVABLE"),
    "RegionState": ("LIVE", "DANGLING"),
    "KindOrigin": ("STATED", "INFERRED"),
    "MmioGranularity": ("PAGE", "VMA"),
    "Cache": ("NORMAL", "NOT_CACHED"),
    "Remap": ("ERROR", "REPLACE"),
    "HvStatus": ("SUCCESS", "TIME_OUT"),
    "errno": ("EPERM", "EIO"),
}
"""Members that another member of the same enum is taken for: the first, unless it is that one."""

_DECLARED = {"log", "Item", "Range", "Value"}
"""Module names that are assigned once and mean no value of ours."""

_Variant = ast.expr | ast.stmt | ast.match_case | ast.comprehension | list[ast.stmt]


@dataclass(frozen=True)
class Mutant:
    """`change` says what is wrong; with `path` and `scope`, the function or nothing, it names the mutant
    wherever the lines move to. `assigned` are the module's names that it changes."""

    path: Path
    scope: str
    change: str
    lines: range
    node: int
    variant: int
    assigned: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.path.name} {self.scope or 'module'}: {self.change}"

    def tree(self) -> ast.Module:
        """The whole module, with the change made."""
        tree = ast.parse(self.path.read_text())
        node = _mutable(tree)[self.node].node
        changed = _Replace(node, _variants(node)[self.variant]).visit(tree)
        assert isinstance(changed, ast.Module)
        return ast.fix_missing_locations(changed)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """In the order of the source."""
    seen: Counter[tuple[str, str]] = Counter()
    for index, place in enumerate(_mutable(ast.parse(path.read_text()))):
        for number, variant in enumerate(_variants(place.node)):
            change = f"{_shown(place.node)} => {_shown(variant)}"
            seen[place.scope, change] += 1
            if (again := seen[place.scope, change]) > 1:
                change += f" (#{again})"
            yield Mutant(path, place.scope, change, place.lines, index, number, place.assigned)


@dataclass(frozen=True)
class _Place:
    node: ast.AST
    scope: str
    lines: range
    assigned: tuple[str, ...]


class _Replace(ast.NodeTransformer):
    def __init__(self, node: ast.AST, variant: _Variant) -> None:
        self._node = node
        self._variant = variant

    def visit(self, node: ast.AST) -> ast.AST | list[ast.stmt]:
        return self._variant if node is self._node else self.generic_visit(node)


def _mutable(tree: ast.Module) -> list[_Place]:
    """The nodes of functions and of the module's assignments."""
    places: list[_Place] = []

    def walk(node: ast.AST, scope: str, lines: range, assigned: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if not _left_alone(child) and child is not getattr(node, "annotation", None):
                own = _lines(child) if isinstance(child, ast.stmt) else lines
                places.append(_Place(child, scope, own, assigned))
                walk(child, scope, own, assigned)

    def look(node: ast.Module | ast.ClassDef, outer: str) -> None:
        for child in node.body:
            match child:
                case ast.ClassDef(name=name):
                    look(child, f"{outer}{name}.")
                case ast.FunctionDef(name=name, body=body) | ast.AsyncFunctionDef(name=name, body=body):
                    says_none = ast.unparse(body[-1]) == "return None"  # as it would without saying it
                    walk(ast.Module(body[: len(body) - says_none], []), f"{outer}{name}", range(0), ())
                case ast.Assign(targets=[ast.Name(id=name)]) if not outer and name not in _DECLARED:
                    walk(child, "", range(0), (name,))

    look(tree, "")
    return places


def _lines(statement: ast.stmt) -> range:
    """Of one that has a body, those before it."""
    body = getattr(statement, "body", None)
    assert statement.end_lineno is not None
    return range(statement.lineno, body[0].lineno if body else statement.end_lineno + 1)


def _left_alone(node: ast.AST) -> bool:
    match node:
        case ast.Assert() | ast.Expr(value=ast.Constant()):
            return True
        case _:
            return False


def _variants(node: ast.AST) -> list[_Variant]:
    return [*_of_statement(node), *_of_expression(node)]


def _of_statement(node: ast.AST) -> Iterator[_Variant]:  # noqa: PLR0912 - one kind of statement a case
    """A step left out, or taken in any case."""
    match node:
        case ast.Expr() | ast.Raise() | ast.Delete() | ast.AugAssign() | ast.For() | ast.AsyncFor():
            yield ast.Pass()
        case (
            ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_])
            | ast.AnnAssign(target=ast.Attribute())
        ):
            yield ast.Pass()
        case ast.Return(value=None | ast.Constant(value=None)) | ast.Break() | ast.Continue():
            yield ast.Pass()
        case ast.Return():
            yield ast.Return(ast.Constant(None))
        case ast.With() | ast.AsyncWith():
            yield from _fewer_contexts(node)
        case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=final):
            if handlers:
                yield [ast.Try(body, [], orelse, final)] if final else [*body, *orelse]
            if final:
                yield [ast.Try(body, handlers, orelse, [])] if handlers else [*body, *orelse]
        case ast.If(body=body, orelse=orelse):
            yield from (ast.If(ast.Constant(met), body, orelse) for met in (True, False))
        case ast.While(body=body, orelse=orelse) if not isinstance(node.test, ast.Constant):
            yield ast.While(ast.Constant(False), body, orelse)
        case ast.Match(subject=subject, cases=cases) if len(cases) > 1:
            yield from (ast.Match(subject, [case for case in cases if case is not gone]) for gone in cases)
        case ast.match_case(pattern=pattern, guard=ast.expr(), body=body):
            yield from (ast.match_case(pattern, ast.Constant(met), body) for met in (True, False))
    match node:
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in _COMPUTED_AS:
            yield ast.AugAssign(target, _COMPUTED_AS[type(op)](), value)


def _of_expression(node: ast.AST) -> Iterator[_Variant]:
    """Another value."""
    match node:
        case ast.IfExp():
            yield from (node.body, node.orelse)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            for n, compared in enumerate(ops):
                changed = [*ops[:n], _COMPARED_AS[type(compared)](), *ops[n + 1 :]]
                yield ast.Compare(left, changed, comparators)
        case ast.BoolOp(op=joined, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(joined, ast.And) else ast.And(), values)
            yield from _without_one(joined, values)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _COMPUTED_AS:
            yield ast.BinOp(left, _COMPUTED_AS[type(op)](), right)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.comprehension(target=target, iter=iterated, ifs=[_, *_]):
            yield ast.comprehension(target, iterated, [], node.is_async)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _CALLED_AS:
            yield ast.Call(ast.Name(_CALLED_AS[name], ast.Load()), args, keywords)
        case ast.Call(func=func, args=args, keywords=keywords) if not _logs(func):
            yield from (ast.Call(func, args, [k for k in keywords if k is not gone]) for gone in keywords)
        case ast.Attribute(value=ast.Name(id=owner) as held, attr=attr) if (
            owner in _TAKEN_FOR and attr.isupper()
        ):
            first, second = _TAKEN_FOR[owner]
            yield ast.Attribute(held, second if attr == first else first, ast.Load())


def _logs(func: ast.expr) -> bool:
    return isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == "log"


def _fewer_contexts(node: ast.With | ast.AsyncWith) -> list[_Variant]:
    """Without each of the contexts whose value is unused."""
    found: list[_Variant] = []
    for gone in node.items:
        rest = [item for item in node.items if item is not gone]
        if gone.optional_vars is None:
            found.append([type(node)(rest, node.body)] if rest else node.body)
    return found


def _without_one(op: ast.boolop, values: list[ast.expr]) -> list[ast.expr]:
    rests = [[value for value in values if value is not gone] for gone in values]
    return [ast.BoolOp(op, rest) if len(rest) > 1 else rest[0] for rest in rests]


def _shown(what: ast.AST | list[ast.stmt]) -> str:
    """The code on one line; of a block, its beginning."""
    if isinstance(what, ast.Pass):
        return "left out"
    nodes = what if isinstance(what, list) else [what]
    text = " ; ".join(" ".join(ast.unparse(ast.fix_missing_locations(n)).split()) for n in nodes)
    return text if len(text) <= 120 else f"{text[:90]} ... {text[-25:]}"
