"""The shape rules: what shape an operator gives, or why its arguments do not fit.

A rule takes the arguments and the constants and returns a shape; it raises `Mismatch` with a reason
that quotes both sides, and whoever knows the source adds where it was.
"""

from __future__ import annotations

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
    del attrs
    left, right = (a.shape for a in args)
    if left == right or not right:
        return left
    if not left:
        return right
    raise Mismatch(f"{show(left)} and {show(right)} differ, and there is no broadcasting")


def unary(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """The argument's own shape."""
    del attrs
    return args[0].shape


def matmul(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """Matrix by matrix (with equal leading axes), matrix by vector, activation by matrix."""
    del attrs
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
    del attrs
    shape = rank_at_least(args[0], 2)
    return (*shape[:-2], shape[-1], shape[-2])


def square(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """A batch of square matrices."""
    del attrs
    shape = rank_at_least(args[0], 2)
    if shape[-1] != shape[-2]:
        raise Mismatch(f"{show(shape)} is not square")
    return shape


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
    del attrs
    return _scaled(args, 0, "rows")


def scale_cols(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """A vector [n] by the columns of a matrix [m, n]."""
    del attrs
    return _scaled(args, 1, "columns")


def _scaled(args: tuple[Expr, ...], axis: int, noun: str) -> Shape:
    (length,), shape = rank(args[0], 1), rank(args[1], 2)
    if length != shape[axis]:
        raise Mismatch(f"{length} factors for the {shape[axis]} {noun} of {show(shape)}")
    return shape


def scale(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """A vector by the last axis of an activation."""
    del attrs
    (length,), shape = rank(args[0], 1), args[1].shape
    if length != shape[-1]:
        raise Mismatch(f"a vector of {length} for the last axis of {show(shape)}")
    return shape


def channelwise(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[channels] to [in]: each channel's value for the whole kernel."""
    del attrs
    if args[0].shape != (CHANNELS,):
        raise Mismatch(f"needs [channels], not {show(args[0].shape)}")
    return (IN,)


def diag(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[n] to [n, n]."""
    del attrs
    (length,) = rank(args[0], 1)
    return (length, length)


def blockdiag(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[n, p, q] to [n * p, n * q]."""
    del attrs
    n, p, q = rank(args[0], 3)
    return (n * p, n * q)


def kron(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[p, q] and [s, t] to [p * s, q * t]."""
    del attrs
    (p, q), (s, t) = rank(args[0], 2), rank(args[1], 2)
    return (p * s, q * t)


def skew(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[..., b * (b - 1) / 2] to [..., b, b]."""
    b = attrs["size"]
    assert isinstance(b, Size)
    shape = rank_at_least(args[0], 1)
    if shape[-1] != b * (b - 1) / 2:
        raise Mismatch(f"a skew matrix of size {b} has {b * (b - 1) / 2} entries, not {shape[-1]}")
    return (*shape[:-1], b, b)


def tile(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[m, q] to [m, columns]."""
    columns = attrs["columns"]
    assert isinstance(columns, Size)
    return (rank(args[0], 2)[0], columns)


def eye(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[n, n]."""
    del args
    n = attrs["size"]
    assert isinstance(n, Size)
    return (n, n)


def rowwise(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[..., m, n] to [..., m]."""
    del attrs
    return rank_at_least(args[0], 2)[:-1]


def colwise(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[..., m, n] to [..., n]."""
    del attrs
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
    bounds = attrs["bounds"]
    assert isinstance(bounds, tuple)
    shape = args[0].shape
    if len(bounds) > len(shape):
        raise Mismatch(f"{len(bounds)} slices for the {len(shape)} axes of {show(shape)}")
    lengths: list[Size] = []
    for axis, bound in zip(shape, bounds, strict=False):
        assert isinstance(bound, tuple)
        start, stop = bound
        assert isinstance(start, Size)
        end = axis if stop is None else stop
        assert isinstance(end, Size)
        lengths.append(end - start)
    return (*lengths, *shape[len(bounds) :])


@lru_cache(maxsize=1024)
def parsed_pattern(pattern: str) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """Both sides of an einops pattern: an axis is the names it is composed of.

    Raises Mismatch for anything that einops would not take; ellipses are not taken.
    """
    from einops import EinopsError
    from einops.parsing import ParsedExpression

    left, arrow, right = pattern.partition("->")
    if not arrow or "..." in pattern or "…" in pattern:
        raise Mismatch(f'"{pattern}" is not a pattern such as "(n r) i -> n r i"')
    try:
        sides = [ParsedExpression(side) for side in (left, right)]
    except EinopsError as error:
        raise Mismatch(str(error)) from None
    before, after = (
        tuple(tuple(str(name) for name in axis) for axis in side.composition) for side in sides
    )
    return before, after


def layout(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """The shape an einops pattern gives; `axes` names the sizes that the shape does not tell."""
    pattern = attrs["pattern"]
    assert isinstance(pattern, str)
    known = axis_sizes(args[0].shape, attrs)
    after = parsed_pattern(pattern)[1]
    unknown = [n for axis in after for n in axis if n not in known]
    if unknown:
        raise Mismatch(f'"{pattern}" does not say how long {unknown[0]} is; add {unknown[0]} = …')
    return tuple(_length(axis, known) for axis in after)


def axis_sizes(shape: Shape, attrs: Attrs) -> dict[str, Size]:
    """The size of every axis that a pattern names, given or solved for."""
    pattern = attrs["pattern"]
    assert isinstance(pattern, str)
    known = given_axes(attrs)
    before = parsed_pattern(pattern)[0]
    if len(before) != len(shape):
        raise Mismatch(f'"{pattern}" names {len(before)} axes, and {show(shape)} has {len(shape)}')
    for names, length in zip(before, shape, strict=True):
        _solve(pattern, names, length, known)
    return known


def given_axes(attrs: Attrs) -> dict[str, Size]:
    """The sizes that were given by name with a pattern."""
    axes = attrs["axes"]
    assert isinstance(axes, tuple)
    return dict(cast(tuple[tuple[str, Size], ...], axes))


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
