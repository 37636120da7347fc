"""The values of operators: what each is as a tensor.

A value works on tensors and on `torch.fx` proxies alike, so it takes its sizes from `Facts` and
never from a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from keyword import iskeyword
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.weak import WeakIdKeyDictionary

from surgery.algebra import shapes
from surgery.algebra.axes import Scalar
from surgery.algebra.expr import Attribute

_linalg: Any = torch.linalg  # its functions carry no types
_fft: Any = torch.fft


@dataclass(frozen=True, slots=True)
class Facts:
    """What a value may know besides its arguments: sizes in elements, constants as numbers."""

    shape: tuple[int, ...]
    arguments: tuple[tuple[int, ...], ...]
    attrs: Mapping[str, Attribute]
    anchor: Tensor  # of the dtype and device to make constants in
    number: Callable[[Scalar], int | float]
    bits: int = 54  # of operands of products that are reproducible
    kept: object = None  # where these find what they have made of operands before

    def integer(self, name: str) -> int:
        """A constant that is a whole size."""
        return int(self.number(cast(Scalar, self.attrs[name])))


def mul(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    """Elementwise, or by a number; a vector [n] by the last axis."""
    return a * b


def scale_rows(facts: Facts, v: Tensor, m: Tensor) -> Tensor:
    """[m] by the rows of [m, n]."""
    return v.unsqueeze(-1) * m


def matmul(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    """[..., m, k] @ [..., k, n], or [..., m, k] @ [k]."""
    return torch.matmul(a, b)


def add(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    """The sum."""
    return a + b


def sub(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    """The difference."""
    return a - b


def div(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    """Elementwise, or by a number."""
    return a / b


def neg(facts: Facts, a: Tensor) -> Tensor:
    """The negative."""
    return -a


def transpose(facts: Facts, a: Tensor) -> Tensor:
    """[..., m, n] to [..., n, m]."""
    return a.transpose(-1, -2)


def power(facts: Facts, a: Tensor) -> Tensor:
    """Each element to a power."""
    return a ** facts.number(cast(Scalar, facts.attrs["exponent"]))


def channelwise(facts: Facts, v: Tensor) -> Tensor:
    """[channels] to [in]: each value for the whole kernel of its channel."""
    (length,), ((channels,),) = facts.shape, facts.arguments
    return v if length == channels else v.repeat_interleave(length // channels)


def diag(facts: Facts, v: Tensor) -> Tensor:
    """[n] to [n, n]."""
    return torch.diag_embed(v)


def blockdiag(facts: Facts, blocks: Tensor) -> Tensor:
    """[n, p, q] to [n * p, n * q]."""
    # [n, p, q] -> [p, q, n, n] -> [n, p, n, q]
    spread = torch.diag_embed(blocks.permute(1, 2, 0)).permute(2, 0, 3, 1)
    return spread.reshape(facts.shape)


def kron(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    """[p, q] and [s, t] to [p * s, q * t]."""
    return torch.kron(a.contiguous(), b.contiguous())


def tile(facts: Facts, m: Tensor) -> Tensor:
    """[m, q] to [m, columns], the columns again and again and the last copy cut."""
    columns = facts.shape[1]
    width = facts.arguments[0][1]
    copies = -(-columns // width)
    tiled = m.repeat(1, copies)
    return tiled if copies * width == columns else tiled.narrow(1, 0, columns)


def eye(facts: Facts) -> Tensor:
    """The identity [n, n]."""
    return facts.anchor.new_ones((facts.shape[0],)).diag()


def trace(facts: Facts, a: Tensor) -> Tensor:
    """The sum of the diagonal of [n, n]."""
    return a.diagonal(0, -2, -1).sum(-1)


def zeros(facts: Facts) -> Tensor:
    """Zeros of any shape."""
    return facts.anchor.new_zeros(facts.shape)


def skew(facts: Facts, v: Tensor) -> Tensor:
    """[..., n (n - 1) / 2] to [..., n, n]: the strictly upper triangle, row by row."""
    b = facts.integer("size")
    lead = facts.shape[:-2]
    upper = torch.triu_indices(b, b, 1, device=v.device)
    flat = v.new_zeros((*lead, b * b)).index_copy(-1, upper[0] * b + upper[1], v)
    square = cast(Tensor, flat.unflatten(-1, (b, b)))
    return square - square.transpose(-1, -2)


def rotate_half(facts: Facts, a: Tensor) -> Tensor:
    """Of each `size` rows of [n] or [n, m] the halves (u, v) become (-v, u)."""
    return turned(a, 0, facts.shape[0], facts.integer("size"))


def turned(a: Tensor, axis: int, length: int, size: int) -> Tensor:
    """Of each `size` elements along an axis, counted from the left, (u, v) become (-v, u)."""
    parts = cast(Tensor, a.unflatten(axis, (length // size, 2, size // 2)))
    inner = axis + 1 if axis >= 0 else axis - 1
    u, v = parts.narrow(inner, 0, 1), parts.narrow(inner, 1, 1)
    joined = torch.cat((-v, u), inner)
    return joined.flatten(axis, axis + 2) if axis >= 0 else joined.flatten(axis - 2, axis)


def scatter(facts: Facts, v: Tensor, places: Tensor) -> Tensor:
    """[n] at their places of zeros [rows, columns]; those at one place are added."""
    rows, columns = facts.shape
    at = flat = places.long()  # flat, they are more than 32 bits hold
    if len(facts.arguments[1]) > 1:
        flat = at.select(0, 0) * columns + at.select(0, 1)
    spread = v.new_zeros((rows * columns,)).scatter_add(0, flat, v)
    return cast(Tensor, spread.unflatten(0, (rows, columns)))


def gather(facts: Facts, v: Tensor, places: Tensor) -> Tensor:
    """The elements of [n] at some places, in the shape that these have."""
    taken = v.index_select(0, places.long().flatten())
    return cast(Tensor, taken.unflatten(0, facts.shape))


def largest(facts: Facts, a: Tensor) -> Tensor:
    """[m, n] to [count]: where the largest elements are, row by row, that of the largest first."""
    return torch.topk(a.flatten(), facts.integer("count"))[1].to(a.dtype)  # float64, which has room


def circulant(facts: Facts, k: Tensor) -> Tensor:
    """[p, q, b] to blocks [b, b], each row of which is that above it, moved on by one."""
    b = facts.arguments[0][-1]
    # Rows of 2 b - 1 entries of k, again and again: each begins one before the last did.
    turns = cast(Tensor, k.repeat(1, 1, 2 * b - 1).unflatten(-1, (b, 2 * b - 1))).narrow(-1, 0, b)
    return turns.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def ifft2(facts: Facts, a: Tensor) -> Tensor:
    """The real part of the inverse discrete Fourier transform of [m, n]."""
    return called(inverse_transform, a)


def inverse_transform(a: Tensor) -> Tensor:
    """The same; in float32 where the dtype is too narrow for a transform."""
    return _fft.ifft2(a.to(wide_dtype(a))).real.to(a.dtype)


def correlate(x: Tensor, k: Tensor) -> Tensor:
    """Blocks of circulants [p, q, b] by vectors [..., q * b], as products of transforms."""
    if has_torch_function((x, k)):  # what stands for a tensor takes the whole as one operation
        return handle_torch_function(correlate, (x, k), x, k)
    wide, (_, q, b) = wide_dtype(x), k.shape
    parts = _fft.rfft(x.to(wide).unflatten(-1, (q, b)))  # [..., q, b // 2 + 1]
    factors = _fft.rfft(k.to(wide)).conj()  # [p, q, b // 2 + 1]
    summed = torch.einsum("...qf,pqf->...pf", parts, factors)
    return _fft.irfft(summed, n=b).flatten(-2).to(x.dtype)


def cayley(facts: Facts, q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 of [..., n, n]; orthogonal if Q is skew-symmetric."""
    one = q.new_ones((facts.shape[-1],)).diag()
    return called(solve, one + q, one - q)


def inverse(facts: Facts, a: Tensor) -> Tensor:
    """The inverse of [..., n, n]."""
    return called(invert, a)


def solve(a: Tensor, b: Tensor) -> Tensor:
    """B A^-1, of [..., n, n]; in float32 where the dtype is too narrow for a factorisation."""
    wide = wide_dtype(a)
    return _linalg.solve(a.to(wide), b.to(wide), left=False).to(a.dtype)


def invert(a: Tensor) -> Tensor:
    """A^-1, of [..., n, n]; in float32 where the dtype is too narrow for a factorisation."""
    return _linalg.inv(a.to(wide_dtype(a))).to(a.dtype)


def wide_dtype(a: Tensor) -> torch.dtype:
    """What a factorisation is computed in."""
    return a.dtype if a.dtype.itemsize >= 4 else torch.float32


def called(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """The function of some tensors; over proxies one node, since it asks for their dtype."""
    first = args[0]
    if isinstance(first, fx.Proxy):
        return cast(Tensor, first.tracer.create_proxy("call_function", function, args, {}))
    return function(*args)


def householder(facts: Facts, u: Tensor) -> Tensor:
    """I - 2 u uᵀ / |u|² of [n], as [n, n]; of zeros the identity."""
    v = unit(u)
    return u.new_ones((facts.shape[0],)).diag() - 2 * torch.outer(v, v)


def unit(u: Tensor) -> Tensor:
    """A vector [n] of length 1 in the same direction; zeros as they are."""
    length = _linalg.vector_norm(u)
    return u / (length + (length == 0))


# Several parameters begin with parts of one factorisation, which is computed once for a tensor.
_FACTORED: dict[str, MutableMapping[Tensor, tuple[Tensor, ...]]] = {
    "svd": WeakIdKeyDictionary(),
    "torch": WeakIdKeyDictionary(),
    "qr": WeakIdKeyDictionary(),
}


def _svd(a: Tensor) -> tuple[Tensor, ...]:
    """U, S and Vᵀ of [m, n], the largest first; of each u the largest element is above 0."""
    u, s, v = _linalg.svd(a, full_matrices=False)
    largest = u.gather(0, u.abs().argmax(0, keepdim=True)).squeeze(0)
    signs = torch.where(largest < 0, -1.0, 1.0).to(u)
    return u * signs, s, signs.unsqueeze(-1) * v


def _torch_svd(a: Tensor) -> tuple[Tensor, ...]:
    """U, S and Vᵀ of [m, n] as torch gives them in float32."""
    return tuple(part.to(a.dtype) for part in _linalg.svd(a.float(), full_matrices=False))


def _qr(a: Tensor) -> tuple[Tensor, ...]:
    """Q and R of [m, n]; no element of R's diagonal is below 0."""
    q, r = _linalg.qr(a)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    return q * signs, signs.unsqueeze(-1) * r


def _factored(name: str, a: Tensor) -> tuple[Tensor, ...]:
    known = _FACTORED[name]
    if a not in known:
        known[a] = {"svd": _svd, "torch": _torch_svd, "qr": _qr}[name](a)
    return known[a]


def _leading(by: str, part: int, axis: int) -> Callable[[Facts, Tensor], Tensor]:
    """The first `rank` places of an axis of one part of a factorization of [m, n]."""

    def value(facts: Facts, a: Tensor) -> Tensor:
        return _factored(by, a)[part].narrow(axis, 0, facts.integer("rank"))

    return value


left_singular = _leading("svd", 0, 1)  # [m, rank], of the largest singular values
singular_values = _leading("svd", 1, 0)  # [rank], falling
right_singular = _leading("svd", 2, 0)  # [rank, n]
svd_left = _leading("torch", 0, 1)  # the same, in float32 and with torch's own signs
svd_values = _leading("torch", 1, 0)
svd_right = _leading("torch", 2, 0)
qr_q = _leading("qr", 0, 1)  # [m, rank], of A = Q R
qr_r = _leading("qr", 1, 0)  # [rank, n]


def least_left_singular(facts: Facts, a: Tensor) -> Tensor:
    """[m, n] to [m, rank]: those of the least of the min(m, n) singular values."""
    u, rank = _factored("svd", a)[0], facts.integer("rank")
    return u.narrow(1, u.shape[1] - rank, rank)


def layout(name: str) -> Callable[..., Tensor]:
    """The value of an einops function."""

    def value(facts: Facts, a: Tensor) -> Tensor:
        given = shapes.given_axes(facts.attrs).items()
        pattern = cast(str, facts.attrs["pattern"])
        by = cast("str | None", facts.attrs.get("by"))
        sizes = {_axis(n): int(facts.number(s)) for n, s in given}
        return _rearranged(name, a, _safe(pattern), by, sizes)

    return value


@lru_cache(maxsize=1024)
def _safe(pattern: str) -> str:
    return shapes.AXIS.sub(lambda found: _axis(found.group()), pattern)


def _axis(name: str) -> str:
    """An axis under a name that einops takes: keywords, and its own arguments, are not."""
    return f"{name}_axis" if iskeyword(name) or name in _TAKEN else name


_TAKEN = frozenset({"axis", "pattern", "tensor", "reduction"})


def _rearranged(
    name: str, a: Tensor, pattern: str, by: str | None, sizes: dict[str, int]
) -> Tensor:
    import einops

    function = cast(Callable[..., Tensor], getattr(einops, name))
    rest = (pattern,) if by is None else (pattern, by)
    if isinstance(a, fx.Proxy):  # einops looks for a backend by type, and a proxy has none
        return cast(Tensor, a.tracer.create_proxy("call_function", function, (a, *rest), sizes))
    return function(a, *rest, **sizes)


def concat(facts: Facts, *parts: Tensor) -> Tensor:
    """Joined along an axis."""
    return torch.cat(parts, dim=cast(int, facts.attrs["axis"]))


def sliced(facts: Facts, a: Tensor) -> Tensor:
    """A part of each axis."""
    bounds = cast(tuple[tuple[Scalar, Scalar | None], ...], facts.attrs["bounds"])
    for axis, (start, _) in enumerate(bounds):
        length = facts.shape[axis]
        if length != facts.arguments[0][axis]:
            a = a.narrow(axis, int(facts.number(start)), length)
    return a


def rownorm(facts: Facts, a: Tensor) -> Tensor:
    """[..., m, n] to [..., m]: the length of each row."""
    return _linalg.vector_norm(a, dim=-1)


def colnorm(facts: Facts, a: Tensor) -> Tensor:
    """[..., m, n] to [..., n]: the length of each column."""
    return _linalg.vector_norm(a, dim=-2)


def detach(facts: Facts, a: Tensor) -> Tensor:
    """The same value, a constant to the gradient."""
    return a.detach()


def topk(facts: Facts, a: Tensor) -> Tensor:
    """The k largest along the last axis, and minus infinity in the other places."""
    largest = torch.topk(a, facts.integer("k"), -1)
    return torch.full_like(a, -math.inf).scatter(-1, largest[1], largest[0])


def softmax(a: Tensor) -> Tensor:
    """Softmax over the last axis."""
    return torch.softmax(a, -1)
