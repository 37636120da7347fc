"""What a piece of syntax mentions: the names in it, and the expressions that decide something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from surgery.language import syntax as ast


def nodes(root: ast.Node) -> Iterator[ast.Node]:
    """Every node below and including `root`, in the order of the text."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed([*_children(node)]))


def names(root: ast.Node) -> frozenset[str]:
    """The names that are read in it."""
    return frozenset(n.id for n in nodes(root) if isinstance(n, ast.Name))


def decisions(method: ast.Method) -> Iterator[ast.Expression]:
    """What must be a value, not a symbol, at a site: conditions, arguments of draws, rates."""
    for node in nodes(method):
        match node:
            case ast.Branch() | ast.Conditional():
                yield node.condition
            case ast.Draw():
                yield from (k.value for k in node.distribution.keywords)
            case ast.Rate():
                yield node.value
            case _:
                continue


def _children(node: ast.Node) -> Iterator[ast.Node]:
    for name in type(node).__dataclass_fields__:
        value: object = getattr(node, name)
        many = cast(tuple[object, ...], value) if isinstance(value, tuple) else (value,)
        yield from (child for child in many if isinstance(child, ast.Node))
