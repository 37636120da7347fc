"""The shape rules: what shape an operator gives, or why its arguments do not fit.

A rule takes the arguments and the constants and returns a shape; it raises `Mismatch` with a reason
that quotes both sides, and whoever knows the source adds where it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import cast

from surgery.algebra.axes import Size, size
from surgery.algebra.expr import CHANNELS, IN, TOKENS, Attribute, Expr, Shape

Attrs = Mapping[str, Attribute]


class Mismatch(Exception):
    """Arguments that do not fit an operator; the message is the reason alone."""


def show(shape: Shape) -> str:
    """A shape as a person writes it: `[out, r]`, or `a number`."""
    return f"[{', '.join(map(str, shape))}]" if shape else "a number"


def same(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """Elementwise between equal shapes, or with a number."""
    left, right = (a.shape for a in args)
    if left == right or not right:
        return left
    if not left:
        return right
    raise Mismatch(f"{show(left)} and {show(right)} differ, and there is no broadcasting")


def unary(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """The argument's own shape."""
    return args[0].shape


def matmul(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """Matrix by matrix (with equal leading axes), matrix by vector, activation by matrix."""
    left, right = (a.shape for a in args)
    if len(left) < 2 or not right:
        raise Mismatch(f"@ needs a matrix on its left, and here are {show(left)} @ {show(right)}")
    if len(right) == 1:
        _inner(left, right, right[0])
        return left[:-1]
    _inner(left, right, right[-2])
    if left[:-2] != right[:-2]:
        raise Mismatch(f"the leading axes of {show(left)} and {show(right)} differ")
    return (*left[:-1], right[-1])


def _inner(left: Shape, right: Shape, row: Size) -> None:
    if left[-1] != row:
        raise Mismatch(f"{show(left)} @ {show(right)}: the inner sizes {left[-1]} and {row} differ")


def transpose(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """The last two axes, exchanged."""
    shape = rank_at_least(args[0], 2)
    return (*shape[:-2], shape[-1], shape[-2])


def square(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """A batch of square matrices."""
    shape = rank_at_least(args[0], 2)
    if shape[-1] != shape[-2]:
        raise Mismatch(f"{show(shape)} is not square")
    return shape


def noise(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """The argument's own shape, that of an activation."""
    if not activation(args[0]):
        shown = show(args[0].shape)
        raise Mismatch(f"noise is for what varies from token to token, and {shown} does not")
    return args[0].shape


def traced(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """Of a square matrix [n, n] a number."""
    rank(args[0], 2)
    return square(args, attrs)[:-2]


def rank_at_least(arg: Expr, rank: int) -> Shape:
    """The shape, if it has at least so many axes."""
    if len(arg.shape) < rank:
        raise Mismatch(f"needs at least {rank} axes, and {show(arg.shape)} has {len(arg.shape)}")
    return arg.shape


def rank(arg: Expr, axes: int) -> Shape:
    """The shape, if it has exactly so many axes."""
    if len(arg.shape) != axes:
        raise Mismatch(f"needs {axes} axes, and {show(arg.shape)} has {len(arg.shape)}")
    return arg.shape


def scale_rows(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """A vector [m] by the rows of a matrix [m, n]."""
    return _scaled(args, 0, "rows")


def scale_cols(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """A vector [n] by the columns of a matrix [m, n]."""
    return _scaled(args, 1, "columns")


def _scaled(args: tuple[Expr, ...], axis: int, noun: str) -> Shape:
    (length,), shape = rank(args[0], 1), rank(args[1], 2)
    if length != shape[axis]:
        raise Mismatch(f"{length} factors for the {shape[axis]} {noun} of {show(shape)}")
    return shape


def some(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """A number for each of so many directions of a matrix [m, n]."""
    rank(args[0], 2)
    return (_rank(attrs),)


def some_rows(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """So many directions of [m, n], each a row [n]."""
    return (_rank(attrs), rank(args[0], 2)[1])


def some_columns(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """So many directions of [m, n], each a column [m]."""
    return (rank(args[0], 2)[0], _rank(attrs))


def _rank(attrs: Attrs) -> Size:
    return cast(Size, attrs["rank"])


def scale(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """A vector by the last axis of an activation."""
    (length,), shape = rank(args[0], 1), args[1].shape
    if length != shape[-1]:
        raise Mismatch(f"a vector of {length} for the last axis of {show(shape)}")
    return shape


def channelwise(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[channels] to [in]: each channel's value for the whole kernel."""
    if args[0].shape != (CHANNELS,):
        raise Mismatch(f"needs [channels], not {show(args[0].shape)}")
    return (IN,)


def diag(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[n] to [n, n]."""
    (length,) = rank(args[0], 1)
    return (length, length)


def blockdiag(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[n, p, q] to [n * p, n * q]."""
    n, p, q = rank(args[0], 3)
    return (n * p, n * q)


def kron(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[p, q] and [s, t] to [p * s, q * t]."""
    (p, q), (s, t) = rank(args[0], 2), rank(args[1], 2)
    return (p * s, q * t)


def scatter(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[n] and their places, [2, n] or row by row [n], to [rows, columns]."""
    (count,), places = rank(args[0], 1), args[1].shape
    if places not in ((size(2), count), (count,)):
        raise Mismatch(f"{count} values have places [2, {count}], not {show(places)}")
    rows, columns = attrs["rows"], attrs["columns"]
    assert isinstance(rows, Size)
    assert isinstance(columns, Size)
    return (rows, columns)


def gather(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[n] and places in it, to one element for each place."""
    rank(args[0], 1)
    return rank_at_least(args[1], 1)


def largest(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[m, n] to so many places."""
    rank(args[0], 2)
    count = attrs["count"]
    assert isinstance(count, Size)
    return (count,)


def circulant(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[p, q, b] to [p * b, q * b]."""
    p, q, b = rank(args[0], 3)
    return (p * b, q * b)


def transformed(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """A matrix to one of the same shape."""
    return rank(args[0], 2)


def householder(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[n], or [n, r] for several columns, to [n, n]."""
    shape = rank_at_least(args[0], 1)
    return (shape[0], shape[0]) if len(shape) == 1 else (rank(args[0], 2)[0], shape[0])


def orthonormal(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[n, r] as it is, where r ≤ n."""
    shape = rank(args[0], 2)
    rest = (shape[0] - shape[1]).number
    if rest is not None and rest < 0:
        raise Mismatch(f"{show(shape)} has more columns than rows")
    return shape


def butterfly(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[m, n, b, b] to [n * b, n * b]."""
    _, n, p, q = rank(args[0], 4)
    if p != q:
        raise Mismatch(f"the blocks of {show(args[0].shape)} are not square")
    return (n * p, n * p)


def topk(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """The argument's own shape."""
    return rank_at_least(args[0], 1)


def skew(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[..., b * (b - 1) / 2] to [..., b, b]."""
    b = attrs["size"]
    assert isinstance(b, Size)
    shape = rank_at_least(args[0], 1)
    if shape[-1] != b * (b - 1) / 2:
        raise Mismatch(f"a skew matrix of size {b} has {b * (b - 1) / 2} entries, not {shape[-1]}")
    return (*shape[:-1], b, b)


def rotate_half(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[n] or [n, m], of which `size` must divide n."""
    if len(args[0].shape) not in (1, 2):
        raise Mismatch(f"needs a vector or a matrix, and here is {show(args[0].shape)}")
    return args[0].shape


def tile(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[m, q] to [m, columns]."""
    columns = attrs["columns"]
    assert isinstance(columns, Size)
    return (rank(args[0], 2)[0], columns)


def eye(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[n, n]."""
    n = attrs["size"]
    assert isinstance(n, Size)
    return (n, n)


def rowwise(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[..., m, n] to [..., m]."""
    return rank_at_least(args[0], 2)[:-1]


def colwise(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[..., m, n] to [..., n]."""
    shape = rank_at_least(args[0], 2)
    return (*shape[:-2], shape[-1])


def concat(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """Joined along an axis, equal in all others."""
    axis = attrs["axis"]
    assert isinstance(axis, int)
    first = args[0].shape
    if not -len(first) <= axis < len(first):
        raise Mismatch(f"{show(first)} has no axis {axis}")
    axis %= len(first)
    total = size(0)
    for arg in args:
        if (*arg.shape[:axis], *arg.shape[axis + 1 :]) != (*first[:axis], *first[axis + 1 :]):
            raise Mismatch(f"{show(first)} and {show(arg.shape)} differ beside axis {axis}")
        total = total + arg.shape[axis]
    return (*first[:axis], total, *first[axis + 1 :])


def subscript(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """A slice of each axis: `bounds` holds start and stop, an axis each."""
    shape = args[0].shape
    lengths: list[Size] = []
    for axis, (start, stop) in zip(shape, slice_bounds(attrs), strict=False):
        length = stop - start
        for part in (start, length, axis - stop):
            if part.number is not None and part.number < (part is length):
                raise Mismatch(f"{start}:{stop} does not lie in an axis of {axis}")
        lengths.append(length)
    return (*lengths, *shape[len(lengths) :])


def slice_bounds(attrs: Attrs) -> tuple[tuple[Size, Size], ...]:
    """Start and stop of each axis that is sliced."""
    return cast(tuple[tuple[Size, Size], ...], attrs["bounds"])


# ------------------------------------------------------------------------------------- layouts

AXIS = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_PATTERN = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9_]*(?<!_)|1(?!\w)|\(|\))\s*")
_REDUCTIONS = ("sum", "mean", "max", "min", "prod")

Side = tuple[tuple[str, ...], ...]


@lru_cache(maxsize=1024)
def parsed_pattern(pattern: str) -> tuple[Side, Side]:
    """Both sides of an einops pattern: an axis is the names it is composed of.

    Raises Mismatch for anything else than names, `1` and one level of parentheses.
    """
    left, arrow, right = pattern.partition("->")
    if not arrow:
        raise Mismatch(f'"{pattern}" is not a pattern such as "(n r) i -> n r i"')
    return _side(left, pattern), _side(right, pattern)


def _side(text: str, pattern: str) -> Side:
    axes: list[list[str]] = []
    text, inside, at = text.strip(), False, 0
    while at < len(text):
        found = _PATTERN.match(text, at)
        token = found.group().strip() if found else text[at:].strip()[:1]
        if found is None or token == ("(" if inside else ")"):
            raise Mismatch(f'"{pattern}" cannot be read at `{token}`')
        if token in ("(", ")"):
            inside = token == "("
        if token == "(" or (token != ")" and not inside):
            axes.append([])
        if token not in ("(", ")", "1"):
            axes[-1].append(token)
        at = found.end()
    names = [n for axis in axes for n in axis]
    if inside or len(set(names)) < len(names):
        raise Mismatch(
            f'"{pattern}": ' + ("`(` is not closed" if inside else "an axis stands twice")
        )
    return tuple(map(tuple, axes))


def rearrange(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """The shape an einops pattern gives, with the same axes on both sides."""
    before, after = _names(attrs)
    _only_in(after, before, attrs, "the right of")
    return repeat(args, attrs)


def repeat(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """The same with axes that are only on the right; their sizes are given by name."""
    before, after = _names(attrs)
    _only_in(before, after, attrs, "the left of")
    return _laid_out(args[0], attrs)


def reduce(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """The same with axes that are only on the left, and vanish."""
    before, after = _names(attrs)
    _only_in(after, before, attrs, "the right of")
    if attrs["by"] not in _REDUCTIONS:
        raise Mismatch(f"a reduction is one of {', '.join(_REDUCTIONS)}, not `{attrs['by']}`")
    return _laid_out(args[0], attrs)


def _laid_out(arg: Expr, attrs: Attrs) -> Shape:
    known = axis_sizes(arg.shape, attrs)
    pattern, after = _pattern(attrs), parsed_pattern(_pattern(attrs))[1]
    unknown = [n for axis in after for n in axis if n not in known]
    if unknown:
        raise Mismatch(f'"{pattern}" does not say how long {unknown[0]} is; add {unknown[0]} = …')
    return tuple(_length(axis, known) for axis in after)


def _names(attrs: Attrs) -> tuple[frozenset[str], frozenset[str]]:
    before, after = parsed_pattern(_pattern(attrs))
    names = frozenset(n for axis in before for n in axis), frozenset(n for a in after for n in a)
    for given in given_axes(attrs):
        if given not in names[0] | names[1]:
            raise Mismatch(f'"{_pattern(attrs)}" has no axis {given}')
    return names


def _only_in(some: frozenset[str], others: frozenset[str], attrs: Attrs, where: str) -> None:
    alone = sorted(some - others)
    if alone:
        raise Mismatch(f'{alone[0]} stands only on {where} "{_pattern(attrs)}"')


def _pattern(attrs: Attrs) -> str:
    return cast(str, attrs["pattern"])


def axis_sizes(shape: Shape, attrs: Attrs) -> dict[str, Size]:
    """The size of every axis that a pattern names, given or solved for."""
    pattern = _pattern(attrs)
    known = given_axes(attrs)
    before = parsed_pattern(pattern)[0]
    if len(before) != len(shape):
        raise Mismatch(f'"{pattern}" names {len(before)} axes, and {show(shape)} has {len(shape)}')
    for names, length in zip(before, shape, strict=True):
        _solve(pattern, names, length, known)
    return known


def given_axes(attrs: Attrs) -> dict[str, Size]:
    """The sizes that were given by name with a pattern."""
    return dict(cast(tuple[tuple[str, Size], ...], attrs["axes"]))


def _solve(pattern: str, names: tuple[str, ...], length: Size, known: dict[str, Size]) -> None:
    missing = [n for n in names if n not in known]
    if len(missing) > 1:
        raise Mismatch(f'"{pattern}" leaves more than one size of ({" ".join(names)}) open')
    product = _length(tuple(n for n in names if n in known), known)
    if missing:
        known[missing[0]] = length / product
    elif product != length:
        raise Mismatch(f'"{pattern}": ({" ".join(names)}) is {product}, and the axis is {length}')


def _length(names: tuple[str, ...], known: dict[str, Size]) -> Size:
    product = size(1)
    for name in names:
        product = product * known[name]
    return product


def activation(arg: Expr) -> bool:
    """Whether the argument varies from token to token."""
    return bool(arg.shape) and arg.shape[0] == TOKENS
