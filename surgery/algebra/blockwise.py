"""Products of blocks block by block, and of reflections one after another, without the matrix.

The results are expressions of the same value, of operators that are cut and that are reproducible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from surgery.algebra.axes import Size, size
from surgery.algebra.expr import Attribute, Expr, node
from surgery.algebra.rules import make, rebuild

Rule = Callable[[Expr, Expr], "Expr | None"]


@lru_cache(maxsize=512)
def blockwise(root: Expr) -> Expr:
    """The expression with all products of its matrices with blocks made block by block."""
    memo: dict[Expr, Expr] = {}

    def visit(expr: Expr) -> Expr:
        if expr not in memo:
            memo[expr] = _product(rebuild(expr, tuple(map(visit, expr.args))))
        return memo[expr]

    return visit(root)


def _product(expr: Expr) -> Expr:
    if expr.op != "matmul" or any(len(a.shape) != 2 for a in expr.args):
        return expr
    left, right = expr.args
    for rules, matrix, other in ((_RIGHT, right, left), (_LEFT, left, right)):
        turned = matrix.op == "transpose"
        inner = matrix.args[0] if turned else matrix
        found = rules.get((inner.op, turned))
        made = None if found is None else found(other, inner.args[0])
        if made is not None:
            return made
    return expr


def _blocks_right(a: Expr, blocks: Expr) -> Expr:
    """A @ blockdiag(X), each block of columns by its own X [n, p, q]."""
    n, p, _ = blocks.shape
    parts = _laid(a, "o (n p) -> n o p", n=n, p=p)
    return _laid(make("matmul", parts, blocks), "n o q -> o (n q)")


def _blocks_left(a: Expr, blocks: Expr) -> Expr:
    """blockdiag(X) @ A, each block of rows by its own X [n, p, q]."""
    n, _, q = blocks.shape
    parts = _laid(a, "(n q) i -> n q i", n=n, q=q)
    return _laid(make("matmul", blocks, parts), "n p i -> (n p) i")


def _reflected(a: Expr, u: Expr) -> Expr | None:
    """A @ (I - U R), see `rotations.reflectors`."""
    if len(u.shape) != 2:
        return None
    return make("sub", a, make("matmul", make("matmul", a, u), _reflectors(u)))


def _reflected_back(a: Expr, u: Expr) -> Expr | None:
    """A @ (I - U R)ᵀ."""
    if len(u.shape) != 2:
        return None
    inner = make("matmul", a, make("transpose", _reflectors(u)))
    return make("sub", a, make("matmul", inner, make("transpose", u)))


def _reflectors(u: Expr) -> Expr:
    return node("reflectors", (u,), u.shape[::-1])


def _flown(a: Expr, blocks: Expr) -> Expr | None:
    """A @ F_0 F_1 ..., see `rotations.butterfly`."""
    return _through(a, blocks, turned=False)


def _flown_back(a: Expr, blocks: Expr) -> Expr | None:
    """A @ (F_0 F_1 ...)ᵀ."""
    return _through(a, blocks, turned=True)


def _through(a: Expr, blocks: Expr, turned: bool) -> Expr | None:
    levels, _, b, _ = blocks.shape
    if levels.number is None:
        return None
    order = range(int(levels.number))
    for level in reversed(order) if turned else order:
        bounds = ((size(level), size(level + 1)),)
        own = _laid(make("slice", blocks, bounds=bounds), "1 n p q -> n p q")
        own = make("transpose", own) if turned else own
        half, part = size(2**level), b / 2
        if level:
            a = _laid(a, "o (g t h c) -> o (g h t c)", t=size(2), h=half, c=part)
        made = _blocks_right(a, own)
        a = _laid(made, "o (g h t c) -> o (g t h c)", t=size(2), h=half, c=part) if level else made
    return a


def _laid(a: Expr, pattern: str, **axes: Size) -> Expr:
    given: Attribute = tuple(axes.items())
    return make("rearrange", a, pattern=pattern, axes=given)


_RIGHT: Mapping[tuple[str, bool], Rule] = {
    ("blockdiag", False): _blocks_right,
    ("householder", False): _reflected,
    ("householder", True): _reflected_back,
    ("butterfly", False): _flown,
    ("butterfly", True): _flown_back,
}
"""A @ M and A @ Mᵀ, by the operator of M."""

_LEFT: Mapping[tuple[str, bool], Rule] = {("blockdiag", False): _blocks_left}
"""M @ A and Mᵀ @ A, by the operator of M; the transpose of blocks is one of blocks."""
