"""Values in float64 with the same bits on any machine, with any number of threads, in any blocks.

A product is a sum of products of few-bit parts of its operands. Each of these is exact, since a
float64 has room for every partial sum of it, so it does not matter in which order, with or without
fused operations, a library adds. Sums, norms and eliminations are element-wise operations in a
fixed order, each of which IEEE 754 rounds alike everywhere.

The splitting is that of Ozaki et al., "Error-free transformations of matrix multiplication by using
fast routines of matrix multiplication and its applications", 2012.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from surgery.algebra import shapes, values
from surgery.algebra.axes import Size
from surgery.algebra.expr import Expr
from surgery.algebra.values import Facts

ValueRule = Callable[..., Tensor]

BITS = 54
"""Of each operand of a product, counted from the largest element of its row or column: as many as
make it as accurate as one in float64."""

_SUMS = 53  # that a float64 adds exactly
_MOST = 50  # of a part, to be split off by adding
_FAR = 400  # of exponents whose products, split, are far from both ends of float64
_AT_ONCE = 2**17  # elements of a result
_KEPT = 2**18  # elements of a right operand whose parts are kept


# ------------------------------------------------------------------------------------- products


Cover = tuple[tuple[int, tuple[int, ...]], ...]
Rights = tuple[list[Tensor], "Tensor | None"]
Kept = MutableMapping[Tensor, tuple[Cover, Rights]]


def product(a: Tensor, b: Tensor, bits: int = BITS, kept: Kept | None = None) -> Tensor:
    """[..., m, k] @ [..., k, n], or [..., m, k] @ [k], of float64.

    The error of an element is at most an ulp of it and k 2⁻⁵¹ of the product of the largest
    magnitudes in its row and its column; on random matrices it is less than half of the error of a
    product in float64. With fewer `bits` it takes less time: the second part of the error is then
    k 2³⁻ᵇⁱᵗˢ of these. What is not finite makes its whole row or column nan.

    kept: where the parts of b are found, or put, if it comes again.
    """
    if b.ndim == 1:
        return product(a, b.unsqueeze(-1), bits).squeeze(-1)
    if not a.numel() or not b.numel():
        return torch.matmul(a, b)
    made = torch.empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float64, device=a.device)
    cover = _cover(a.shape[-1], bits)
    if a.ndim == 2:
        _by_rows(a.double(), _right_parts(b, cover, kept), made, cover)
    else:
        _by_batches(a.double().flatten(0, -3), b.flatten(0, -3), made.flatten(0, -3), cover)
    return made.to(a.dtype)


def _by_rows(a: Tensor, rights: Rights, made: Tensor, cover: Cover) -> None:
    """Some rows at a time, so that what is made on the way stays in a processor's cache."""
    rows = max(1, _AT_ONCE // a.shape[-1])
    room = _room(a[:rows], made[: max(1, _AT_ONCE // made.shape[-1])], cover)
    for at in range(0, len(a), rows):
        _multiplied(a[at : at + rows], rights, made[at : at + rows], room)


def _by_batches(a: Tensor, b: Tensor, made: Tensor, cover: Cover) -> None:
    """Some matrices at a time, for the same reason."""
    count = max(1, _AT_ONCE // (made.shape[-2] * max(made.shape[-1], a.shape[-1])))
    room = _room(a[:count], made[:count], cover)
    for at in range(0, len(a), count):
        here = slice(at, at + count)
        _multiplied(a[here], _right_parts(b[here], cover), made[here], room)


class _Room(NamedTuple):
    """Where the parts of the left operand, what is left of it, and products are made."""

    cover: Cover
    parts: Tensor
    rest: Tensor
    product: Tensor


def _room(a: Tensor, made: Tensor, cover: Cover) -> _Room:
    parts = a.new_empty((len(cover), *a.shape))
    return _Room(cover, parts, torch.empty_like(a), torch.empty_like(made))


def _multiplied(a: Tensor, rights: Rights, made: Tensor, room: _Room) -> None:
    n, (parts, columns) = len(a), rights
    near, exponents, rows = _near(a, -1, room.rest[:n])
    widths = tuple(bits for bits, _ in room.cover)
    left = _split(near, exponents, widths, (room.parts[:, :n], room.rest[:n]))
    count = len(room.product)
    for at in range(0, n, count):
        here = slice(at, at + count)
        lefts = [p[here] for p, (_, wide) in zip(left, room.cover, strict=True) for _ in wide]
        _added(lefts, parts, made[here], room.product)
    if rows is not None:
        made *= rows
    if columns is not None:
        made *= columns


def _added(lefts: list[Tensor], rights: list[Tensor], made: Tensor, room: Tensor) -> None:
    """The products, from the smallest on."""
    torch.matmul(lefts[-1], rights[-1], out=made)
    for left, right in zip(reversed(lefts[:-1]), reversed(rights[:-1]), strict=True):
        made += torch.matmul(left, right, out=room[: len(made)])


@lru_cache(maxsize=256)
def _cover(length: int, wanted: int) -> Cover:
    """The parts of the left operand, each by its bits and those of the right's parts beside it.

    The bits of two parts and of the length are those of an exact sum. Together the parts, from the
    highest bits on, make all products of bits down to those wanted, in as few products as can be.
    """
    room = _SUMS - (length - 1).bit_length()
    best: dict[int, tuple[int, Cover]] = {}
    for at in range(wanted - 1, -1, -1):
        choices = list[tuple[int, Cover]]()
        for bits in range(1, min(room, _MOST)):
            count = -(-(wanted - at) // (room - bits))
            more, after = best.get(at + bits, (0, ()))
            each = -(-(wanted - at) // count)
            choices.append((count + more, ((bits, (each,) * count), *after)))
        best[at] = min(choices, key=lambda choice: choice[0])
    return best[0][1]


def _right_parts(b: Tensor, cover: Cover, kept: Kept | None = None) -> Rights:
    """A part for each product, and what the columns of the result are multiplied by."""
    known = None if kept is None else kept.get(b)
    if known is not None and known[0] == cover:
        return known[1]
    wide = b.double()
    rest = torch.empty_like(wide)
    near, exponents, factors = _near(wide, -2, rest)
    split = {
        beside: _split(near, exponents, beside, (wide.new_empty((len(beside), *b.shape)), rest))
        for _, beside in cover
    }
    found: Rights = [part for _, beside in cover for part in split[beside]], factors
    if kept is not None and b.numel() <= _KEPT:
        kept[b] = cover, found
    return found


def _near(a: Tensor, axis: int, room: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """With exponents that are not far from 0, these, and what that is made up for by."""
    top = torch.abs(a, out=room).amax(axis, keepdim=True)
    exponents = (top.view(torch.int64) >> 52) - 1022  # |a| < 2 ** exponent
    if not bool(exponents.abs().amax() > _FAR):
        return a, exponents, None
    near = exponents.clamp(-_FAR, _FAR)
    moved = torch.where(top == 0, 0, exponents - near)
    return a * _power_of_two(-moved), near, _power_of_two(moved)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Of whole numbers from -1022 to 1023, exactly."""
    return ((exponents + 1023) << 52).view(torch.float64)


def _split(
    a: Tensor, exponents: Tensor, widths: tuple[int, ...], room: tuple[Tensor, Tensor]
) -> Tensor:
    """Parts of so many bits each, the highest first; what is below the last is rounded away.

    room: where they are made, and what is left of them.
    """
    (parts, rest), bits = room, 0
    # Numbers so large that what is added to them is rounded to as many bits as a part has.
    scale = 1.5 * _power_of_two(exponents + 52)
    for place, width in enumerate(widths):
        bits += width
        large = scale * 2.0**-bits
        torch.add(a, large, out=parts[place]).sub_(large)
        if place + 1 < len(widths):
            a = torch.sub(a, parts[place], out=rest)
    return parts


# ----------------------------------------------------------------------------------------- sums


def total(a: Tensor, combine: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Tensor:
    """The sum over the last axis of [..., n], in pairs, pairs of pairs and so on."""
    if not a.shape[-1]:
        return a.sum(-1)
    while (n := a.shape[-1]) > 1:
        half = n // 2
        paired = combine(a[..., :half], a[..., half : 2 * half])
        a = torch.cat((paired, a[..., 2 * half :]), -1) if n % 2 else paired
    return a.squeeze(-1)


def norm(a: Tensor) -> Tensor:
    """The length of each row of [..., n]."""
    wide = a.double()
    near, _, factors = _near(wide, -1, torch.empty_like(wide))
    length = total(near * near).sqrt()
    return (length if factors is None else length * factors.squeeze(-1)).to(a.dtype)


def _matmul(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    return product(a, b, facts.bits, cast("Kept | None", facts.kept))


def _rownorm(facts: Facts, a: Tensor) -> Tensor:
    return norm(a)


def _colnorm(facts: Facts, a: Tensor) -> Tensor:
    return norm(a.transpose(-1, -2))


def _trace(facts: Facts, a: Tensor) -> Tensor:
    return total(a.diagonal(0, -2, -1))


def _reduced(facts: Facts, a: Tensor) -> Tensor:
    by = cast(str, facts.attrs["by"])
    if by in ("max", "min"):
        return values.layout("reduce")(facts, a)
    pattern = cast(str, facts.attrs["pattern"])
    before, after = shapes.parsed_pattern(pattern)
    left = {n for axis in after for n in axis}
    gone = " ".join(n for axis in before for n in axis if n not in left)
    laid = f"{pattern} ({gone})"
    axes = facts.attrs["axes"]
    rows = values.layout("rearrange")(replace(facts, attrs={"pattern": laid, "axes": axes}), a)
    if by == "prod":
        return total(rows, torch.mul)
    summed = total(rows)
    return summed / rows.shape[-1] if by == "mean" else summed


# --------------------------------------------------------------------------------- eliminations


def solved(a: Tensor, b: Tensor) -> Tensor:
    """A⁻¹ B of [..., n, n] and [..., n, m], by Gauss and Jordan's elimination with pivots.

    Of what is singular it is not finite. n³ operations, n at a time: for blocks of up to hundreds.
    """
    n = a.shape[-1]
    both = torch.cat((a, b), -1).double()
    for column in range(n):
        both = _pivoted(both, column)
        row = both[..., column, :] / both[..., column, column, None]
        factors = both[..., :, column].clone()
        factors[..., column] = 0
        both = both - factors.unsqueeze(-1) * row.unsqueeze(-2)
        both[..., column, :] = row
    return both[..., n:].to(a.dtype)


def _pivoted(both: Tensor, column: int) -> Tensor:
    """The row with the largest element of a column, of those from there on, in its place."""
    best = both[..., column:, column].abs().argmax(-1, keepdim=True) + column
    if bool((best == column).all()):
        return both
    here = torch.full_like(best, column)
    order = torch.arange(both.shape[-2], device=both.device).expand(both.shape[:-1]).clone()
    order.scatter_(-1, best, here)
    order[..., column] = best.squeeze(-1)
    return both.gather(-2, order.unsqueeze(-1).expand(both.shape))


def _inverse(facts: Facts, a: Tensor) -> Tensor:
    return solved(a, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand(a.shape))


def _cayley(facts: Facts, q: Tensor) -> Tensor:
    # X (I + Q) = I - Q, of which both sides are polynomials in Q and change places.
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand(q.shape)
    return solved(one + q, one - q)


def _neumann(facts: Facts, q: Tensor) -> Tensor:
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    made = one.expand(q.shape)
    for _ in range(facts.integer("terms")):
        made = one + product(q, made)
    return made


# -------------------------------------------------------------------------------- orthogonality


def _reflectors(facts: Facts, u: Tensor) -> Tensor:
    """As `rotations.reflectors`, by substitution from below."""
    gram = product(u.transpose(-1, -2), u)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    diagonal = squares / 2 + (squares == 0).to(u.dtype)
    rest = u.transpose(-1, -2).clone()
    for row in range(rest.shape[-2] - 1, -1, -1):
        rest[row] = rest[row] / diagonal[row]
        rest[:row] = rest[:row] - gram[:row, row, None] * rest[row]
    return rest


def _householder(facts: Facts, u: Tensor) -> Tensor:
    one = torch.eye(u.shape[0], dtype=u.dtype, device=u.device)
    if u.ndim > 1:
        return one - product(u, _reflectors(facts, u))
    length = norm(u)
    v = u / (length + (length == 0))
    return one - 2 * (v.unsqueeze(1) * v)


# In every dtype the same; see `rotations`.
_ROUNDING = torch.finfo(torch.float32).eps


def _orthonormal(facts: Facts, u: Tensor) -> Tensor:
    """As `rotations.orthonormal`."""
    lengths, found = norm(u.transpose(0, 1)), u[:, :0]
    for column in range(u.shape[1]):
        rest = u[:, column]
        for _ in range(2):  # once is not orthogonal where little is left
            rest = rest - product(found, product(found.transpose(0, 1), rest))
        left = norm(rest)
        lies = left <= u.shape[0] * _ROUNDING * lengths[column]
        direction = torch.where(lies, 0.0, rest) / torch.where(lies, 1.0, left)
        found = torch.cat((found, direction.unsqueeze(1)), 1)
    return found


# --------------------------------------------------------------------------------------- places


def placed(v: Tensor, flat: Tensor, count: int) -> Tensor:
    """[n] at places of zeros [count]; those at one place are added in their order."""
    made = v.new_zeros((count,))
    order = torch.argsort(flat, stable=True)
    at, v = flat[order], v[order]
    while len(at):
        first = torch.ones_like(at, dtype=torch.bool)
        first[1:] = at[1:] != at[:-1]
        made[at[first]] = made[at[first]] + v[first]
        at, v = at[~first], v[~first]
    return made


def _scatter(facts: Facts, v: Tensor, places: Tensor) -> Tensor:
    rows, columns = facts.shape
    at = places.long()
    flat = at[0] * columns + at[1] if at.ndim > 1 else at
    return placed(v, flat, rows * columns).view(rows, columns)


# ---------------------------------------------------------------------------------------- table


_MOST_FACTORS = 16


def _power(facts: Facts, a: Tensor) -> Tensor:
    exponent = facts.number(cast(Size, facts.attrs["exponent"]))
    if not isinstance(exponent, int) or abs(exponent) > _MOST_FACTORS:
        return values.power(facts, a)
    made = torch.ones_like(a)
    for _ in range(abs(exponent)):
        made = made * a
    return made if exponent >= 0 else 1 / made


_SAME = frozenset(
    (
        *(
            "add",
            "sub",
            "neg",
            "mul",
            "div",
            "transpose",
            "scale_rows",
            "scale_cols",
            "channelwise",
        ),
        *("diag", "blockdiag", "kron", "tile", "eye", "zeros", "drop", "skew", "rotate_half"),
        *("rearrange", "repeat", "concat", "slice", "gather", "circulant", "ungrouped"),
        *("stop_gradient", "sqrt", "abs", "relu"),
    )
)
"""The operators whose own values are such: moved elements, and what IEEE 754 says the result of."""

_EXACT: Mapping[str, ValueRule] = {
    "matmul": _matmul,
    "rownorm": _rownorm,
    "colnorm": _colnorm,
    "trace": _trace,
    "reduce": _reduced,
    "power": _power,
    "cayley": _cayley,
    "inverse": _inverse,
    "neumann": _neumann,
    "reflectors": _reflectors,
    "householder": _householder,
    "orthonormal": _orthonormal,
    "scatter": _scatter,
}


NAMES = _SAME | _EXACT.keys()
"""The operators with such a value."""


def exact(name: str, value: ValueRule) -> ValueRule | None:
    """The value of an operator with the same bits anywhere; None where it has none.

    None have those that a library approximates: exp, log, sin, cos, tanh and what is made of them,
    transforms, factorizations.
    """
    return value if name in _SAME else _EXACT.get(name)


def is_settled(expr: Expr) -> bool:
    """Whether an operator, of which there is such a value, has it with the constants here."""
    if expr.op != "power":
        return True
    exponent = cast(Size, expr.attr("exponent")).number
    return exponent is not None and exponent.denominator == 1 and abs(exponent) <= _MOST_FACTORS
