"""The values of operators: what each is as a tensor.

A value works on tensors and on `torch.fx` proxies alike, so it takes its sizes from `Facts` and
never from a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from keyword import iskeyword
from typing import Any, cast

import torch
from torch import Tensor, fx

from surgery.algebra import shapes
from surgery.algebra.axes import Scalar
from surgery.algebra.expr import Attribute

_linalg: Any = torch.linalg  # its functions carry no types


@dataclass(frozen=True, slots=True)
class Facts:
    """What a value may know besides its arguments: sizes in elements, constants as numbers."""

    shape: tuple[int, ...]
    arguments: tuple[tuple[int, ...], ...]
    attrs: Mapping[str, Attribute]
    anchor: Tensor  # of the dtype and device to make constants in
    number: Callable[[Scalar], int | float]

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


def cayley(facts: Facts, q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 of [..., n, n]; orthogonal if Q is skew-symmetric."""
    one = q.new_ones((facts.shape[-1],)).diag()
    return _called(solve, one + q, one - q)


def inverse(facts: Facts, a: Tensor) -> Tensor:
    """The inverse of [..., n, n]."""
    return _called(invert, a)


def solve(a: Tensor, b: Tensor) -> Tensor:
    """B A^-1, of [..., n, n]; in float32 where the dtype is too narrow for a factorisation."""
    wide = _wide(a)
    return _linalg.solve(a.to(wide), b.to(wide), left=False).to(a.dtype)


def invert(a: Tensor) -> Tensor:
    """A^-1, of [..., n, n]; in float32 where the dtype is too narrow for a factorisation."""
    return _linalg.inv(a.to(_wide(a))).to(a.dtype)


def _wide(a: Tensor) -> torch.dtype:
    return a.dtype if a.dtype.itemsize >= 4 else torch.float32


def _called(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """The function of some tensors; over proxies one node, since it asks for their dtype."""
    first = args[0]
    if isinstance(first, fx.Proxy):
        return cast(Tensor, first.tracer.create_proxy("call_function", function, args, {}))
    return function(*args)


def householder(facts: Facts, u: Tensor) -> Tensor:
    """I - 2 u uᵀ / |u|² of [n], as [n, n]."""
    v = unit(u)
    return u.new_ones((facts.shape[0],)).diag() - 2 * torch.outer(v, v)


def unit(u: Tensor) -> Tensor:
    """A vector [n] of length 1 in the same direction."""
    return u / _linalg.vector_norm(u)


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


def softmax(a: Tensor) -> Tensor:
    """Softmax over the last axis."""
    return torch.softmax(a, -1)
