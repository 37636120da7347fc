"""The arithmetic that an equation adds to a forward: the interpreter, run over shapes alone.

Counted are two operations for every multiplication of a product of matrices, with the addition that
goes with it, and one for every element that an elementwise operation gives or a norm reads. Lookups
and layouts are free. Neither a tensor nor a kernel is made, and nothing of torch's meta device is
imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, Protocol, cast

from torch import Tensor

from surgery.algebra.around import entered, left
from surgery.algebra.axes import evaluate
from surgery.algebra.cost import numbers, own_work
from surgery.algebra.derive import Derived
from surgery.algebra.expr import Expr
from surgery.algebra.interpret import Domain, Interpreter, Unlowerable
from surgery.algebra.rules import constant
from surgery.model.layers import Geometry, LayerKind, Mode, Sizes

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations beyond the base's own.

    token: of a forward, for each token (a convolution's output position); below 0 where the
        adapted layer takes less than the base.
    call: of a forward besides, whatever the number of tokens.
    """

    token: int
    call: int

    def __add__(self, other: Work) -> Work:
        """Of both."""
        return Work(self.token + other.token, self.call + other.call)


class Place(Protocol):
    """What is asked of a class of sites."""

    @property
    def derived(self) -> Derived:
        """What its method comes to."""
        ...

    @property
    def kind(self) -> LayerKind:
        """The layer kind."""
        ...

    @property
    def sizes(self) -> Sizes:
        """The sizes of the weight."""
        ...

    @property
    def geometry(self) -> Geometry | None:
        """Of a convolution."""
        ...

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds one."""
        ...

    @property
    def batch(self) -> int | None:
        """The number of matrices, where it is a batch of them."""
        ...

    @property
    def mode(self) -> Mode:
        """How the layer is reached."""
        ...


def extra_work(place: Place, names: Mapping[str, int | float]) -> Work | None:
    """What a forward takes beyond the base's; None where the equation cannot run there.

    names: the sizes by name.
    """
    tally = _Tally()
    port = _Port(place, tally)
    anchor = Shaped((), False, tally)
    domain = Domain(names, lambda expr: cast(Tensor, anchor), lambda: cast(Tensor, anchor))
    x = Shaped((place.sizes.groups, place.sizes.fan_in), True, tally)
    if place.sizes.groups == 1:
        x = replace(x, shape=(place.sizes.fan_in,))
    counter = _Counter(domain, port, tally, place.has_bias)
    try:
        if place.mode == "value":  # W' is built for each call, and the layer runs on it as it is
            merged = place.derived.merged
            parts = () if merged is None else (merged.weight, merged.bias)
            list(map(counter.value, parts))
            return Work(0, tally.call * (place.batch or 1))
        if place.mode == "around":
            given = cast(Tensor, x)
            entered(counter, place.derived.equations, given)
            left(counter, place.derived, given, given, given)
            return Work(tally.token, tally.call)
        counter.run(place.derived, cast(Tensor, x))
    except Unlowerable:
        return None
    return Work(tally.token - port.own, tally.call)


@dataclass(slots=True)
class _Tally:
    """What has been counted: on the way of each token, and of parameters alone."""

    token: int = 0
    call: int = 0


# ----------------------------------------------------------------------------------- shapes


@dataclass(frozen=True, eq=False, slots=True)
class Shaped:
    """Stands for a tensor where a matrix is applied: its shape for one token, and nothing else.

    token: whether there is one a token; else it is made of parameters.
    """

    shape: Shape
    token: bool
    tally: _Tally = field(repr=False)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Shaped:
        """What a function of torch gives; what is not known here is elementwise."""
        del types, kwargs
        known = _FUNCTIONS.get(getattr(func, "__name__", ""))
        return _elementwise(*args) if known is None else known(*args)

    def of(self, shape: Shape) -> Shaped:
        """The same elements, or some of them, in another layout."""
        return replace(self, shape=shape)

    def counted(self, work: int) -> Shaped:
        """Itself, as the result of so much work."""
        if self.token:
            self.tally.token += work
        else:
            self.tally.call += work
        return self

    def unflatten(self, dim: int, sizes: Shape) -> Shaped:
        """An axis as several; one of the sizes may be -1."""
        whole, at = self.shape[dim], dim % len(self.shape)
        known = prod(s for s in sizes if s >= 0)
        made = tuple(whole // known if s < 0 else s for s in sizes)
        return self.of((*self.shape[:at], *made, *self.shape[at + 1 :]))

    def flatten(self, start: int, end: int = -1) -> Shaped:
        """The axes from one to another as one."""
        at, last = start % len(self.shape), end % len(self.shape) + 1
        return self.of((*self.shape[:at], prod(self.shape[at:last]), *self.shape[last:]))

    def narrow(self, dim: int, start: int, length: int) -> Shaped:
        """Some of an axis."""
        del start
        at = dim % len(self.shape)
        return self.of((*self.shape[:at], length, *self.shape[at + 1 :]))

    def unsqueeze(self, dim: int) -> Shaped:
        """One more axis, of length 1."""
        at = dim % (len(self.shape) + 1)
        return self.of((*self.shape[:at], 1, *self.shape[at:]))

    def transpose(self, one: int, other: int) -> Shaped:
        """Two axes exchanged."""
        shape = list(self.shape)
        shape[one], shape[other] = shape[other], shape[one]
        return self.of(tuple(shape))

    def sum(self, dim: int) -> Shaped:
        """The sum over an axis."""
        at = dim % len(self.shape)
        return self.of((*self.shape[:at], *self.shape[at + 1 :])).counted(prod(self.shape))

    def expand_as(self, other: Shaped) -> Shaped:
        """In the shape of another, one a token as that is."""
        return other

    def new_ones(self, shape: Shape) -> Shaped:
        """A constant."""
        return self.of(shape)

    def new_full(self, shape: Shape, value: float) -> Shaped:
        """A constant."""
        del value
        return self.of(shape)

    def __add__(self, other: object) -> Shaped:
        """One operation an element."""
        return _elementwise(self, other)

    __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __add__
    __pow__ = __rpow__ = __add__

    def __neg__(self) -> Shaped:
        """One operation an element."""
        return _elementwise(self)


def _elementwise(*operands: object) -> Shaped:
    """One operation for each element of the result."""
    found = [operand for operand in operands if isinstance(operand, Shaped)]
    width = max(len(f.shape) for f in found)
    padded = [(1,) * (width - len(f.shape)) + f.shape for f in found]
    shape = tuple(map(max, *padded)) if len(padded) > 1 else padded[0]
    return _result(shape, *found).counted(prod(shape))


def _result(shape: Shape, *operands: Shaped) -> Shaped:
    return Shaped(shape, any(o.token for o in operands), operands[0].tally)


def _linear(x: Shaped, matrix: Shaped, bias: object = None) -> Shaped:
    del bias
    made = _result((*x.shape[:-1], matrix.shape[0]), x, matrix)
    return made.counted(2 * prod(made.shape) * x.shape[-1])


def _matmul(left: Shaped, right: Shaped) -> Shaped:
    a = left.shape if len(left.shape) > 1 else (1, *left.shape)
    b = right.shape if len(right.shape) > 1 else (*right.shape, 1)
    width = max(len(a), len(b)) - 2
    batches = [(1,) * (width + 2 - len(s)) + s[:-2] for s in (a, b)]
    batch = tuple(map(max, *batches)) if width else ()
    work = 2 * prod(batch) * a[-2] * a[-1] * b[-1]
    rows = a[-2:-1] if len(left.shape) > 1 else ()
    columns = b[-1:] if len(right.shape) > 1 else ()
    return _result((*batch, *rows, *columns), left, right).counted(work)


def _selected(x: Shaped, dim: int, index: int) -> Shaped:
    del index
    at = dim % len(x.shape)
    return x.of((*x.shape[:at], *x.shape[at + 1 :]))


def _pad(x: Shaped, amounts: Sequence[int], *rest: object) -> Shaped:
    del rest
    return x.of((*x.shape[:-1], x.shape[-1] + sum(amounts)))


def _looked_up(index: Shaped, table: Shaped, *rest: object) -> Shaped:
    del rest
    return index.of(table.shape[1:])


def _correlated(x: Shaped, blocks: Shaped) -> Shaped:
    p, q, b = blocks.shape
    forth, back = (n * b * b.bit_length() for n in (q, p))
    blocks.counted(p * forth)
    # A product of p x q complex numbers for each of half of the frequencies.
    return _result((*x.shape[:-1], p * b), x).counted(forth + 2 * p * q * (b // 2 + 1) + back)


def _as_it_is(x: Shaped, *rest: object) -> Shaped:
    del rest
    return x


def _joined(parts: Sequence[Shaped], axis: int) -> Shaped:
    first, at = parts[0], axis % len(parts[0].shape)
    length = sum(part.shape[at] for part in parts)
    return _result((*first.shape[:at], length, *first.shape[at + 1 :]), *parts)


_FUNCTIONS: Mapping[str, Callable[..., Shaped]] = {
    "linear": _linear,
    "matmul": _matmul,
    "cat": _joined,
    "pad": _pad,
    "select": _selected,
    "embedding": _looked_up,
    "correlate": _correlated,
    "drawn": _as_it_is,
    "dropout": _as_it_is,  # it is the identity where nothing is trained
    "detach": _as_it_is,
}
"""What the rules of application call, by the name of the function."""


# ---------------------------------------------------------------------------------- counting

_TWICE = frozenset(
    {"matmul", "cayley", "inverse", "reflectors", "orthonormal", "qr", "butterfly", "neumann"}
)
"""Operators whose multiplications each come with an addition."""


class _Counter(Interpreter):
    """Applies an equation to the shape of a token, and counts dense values by the cost table."""

    def __init__(self, domain: Domain, port: _Port, tally: _Tally, has_bias: bool) -> None:
        super().__init__(domain, cast(Any, port), has_bias)
        self._tally = tally

    def _compute(self, expr: Expr) -> Tensor:
        if expr.op == "number":
            return cast(Tensor, evaluate(constant(expr), self.domain.names))
        shape = numbers(expr, self.domain.names)
        value = Shaped(shape, False, self._tally)
        if expr.args:
            for argument in expr.args:
                self._value(argument)
            work = own_work(expr, self.domain.names)
            value.counted(2 * work if expr.op in _TWICE else work)
        return cast(Tensor, value)


class _Port:
    """What a site offers. `own` is what the base's product takes by itself."""

    def __init__(self, place: Place, tally: _Tally) -> None:
        self.form: Literal["features", "patches", "indices"] = place.kind.input
        self.groups = place.sizes.groups
        self._sizes = place.sizes
        self._tally = tally
        self.own = self._product(place.sizes.fan_out)

    def _product(self, rows: int) -> int:
        """A matrix of so many rows on the input, which is a lookup where that is an index."""
        return 0 if self.form == "indices" else 2 * rows * self._sizes.fan_in

    def base(self, x: Shaped, changed: bool) -> Shaped:
        """The site's own product."""
        del x, changed
        return Shaped((self._sizes.fan_out,), True, self._tally).counted(self.own)

    def apply(self, matrix: Shaped, x: Shaped, whole: bool) -> Shaped:
        """A whole matrix on the input."""
        del x
        rows = matrix.shape[0]
        split = self.groups > 1 and not whole
        made = Shaped((self.groups, rows) if split else (rows,), True, self._tally)
        return made.counted(self._product(prod(made.shape)))

    def features(self, x: Shaped) -> Shaped:
        """The input as it is."""
        return x

    def widen(self, y: Shaped) -> Shaped:
        """The output as it is."""
        return y

    def scale_channels(self, x: Shaped, factors: Shaped) -> Shaped:
        """One operation a channel and group, taking a position of the input for one of the output.

        The two are equally many where the stride is 1.
        """
        return x.counted(self.groups * factors.shape[0])

    def training(self) -> bool:
        """Counted is what an evaluation takes."""
        return False
