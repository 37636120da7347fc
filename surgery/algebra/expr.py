"""The one node of the algebra: an operator, its arguments and constants, and a symbolic shape.

Nodes are interned: equal expressions are the same object, so equality is identity, sharing is
kept, and a walk with a memo is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Final
from weakref import WeakValueDictionary

from surgery.algebra.axes import Scalar, Size, size, symbol

Shape = tuple[Size, ...]
Attribute = str | int | float | bool | Size | None | tuple["Attribute", ...]

TOKENS: Final = symbol("…")  # the leading axes of an activation, however many; no one's name
IN: Final = symbol("in")
OUT: Final = symbol("out")
CHANNELS: Final = symbol("channels")
HIDDEN: Final = symbol("hidden")


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True, repr=False)
class Expr:
    """`op(args; attrs)` of some shape. Made by `node`, never directly.

    depth: how many operators stand one inside the other; 0 for a leaf.
    """

    op: str
    args: tuple[Expr, ...]
    attrs: tuple[tuple[str, Attribute], ...]
    shape: Shape
    depth: int

    def attr(self, name: str) -> Attribute:
        """A constant by name; KeyError if it has none of that name."""
        return dict(self.attrs)[name]

    def text(self, name: str) -> str:
        """A constant that is a text."""
        value = self.attr(name)
        assert isinstance(value, str)
        return value

    @property
    def is_scalar(self) -> bool:
        """Whether it has no axes."""
        return not self.shape

    @property
    def is_activation(self) -> bool:
        """Whether it varies from token to token."""
        return bool(self.shape) and self.shape[0] == TOKENS

    def __repr__(self) -> str:
        """As text of bounded length; that of all fields would repeat what is shared."""
        return f"<Expr {render(self)}>"

    def __reduce__(self) -> tuple[Callable[..., Expr], tuple[object, ...]]:
        """As the call that makes it, so that it is interned where it is read."""
        return node, (self.op, self.args, self.shape, self.attrs)

    def __deepcopy__(self, memo: dict[int, object]) -> Expr:
        """Itself: it is interned and immutable."""
        return self


_INTERNED: WeakValueDictionary[tuple[object, ...], Expr] = WeakValueDictionary()
_INTERNING = Lock()


def node(
    op: str,
    args: tuple[Expr, ...],
    shape: Shape,
    attrs: tuple[tuple[str, Attribute], ...] = (),
) -> Expr:
    """The expression of these parts; the same object for the same parts."""
    key = (op, args, attrs, shape)
    found = _INTERNED.get(key)
    if found is None:
        depth = max((a.depth + 1 for a in args), default=0)
        made = Expr(op, args, attrs, shape, depth)
        with _INTERNING:  # of two threads that make the same, the second takes the first's
            found = _INTERNED.setdefault(key, made)
    return found


def number(value: Scalar) -> Expr:
    """A scalar constant."""
    return node("number", (), (), (("value", size(value)),))


def zeros(shape: Shape) -> Expr:
    """A tensor of zeros; what an absent bias is."""
    return node("zeros", (), shape)


def parameter(name: str, shape: Shape) -> Expr:
    """A parameter of the method."""
    return node("parameter", (), shape, (("name", name),))


WEIGHT: Final = node("weight", (), (OUT, IN))
BIAS: Final = node("bias", (), (OUT,))
INPUT: Final = node("x", (), (TOKENS, IN))
OUTPUT: Final = node("y", (), (TOKENS, OUT))
ORIGIN: Final = node("x0", (), (TOKENS, IN))  # in y' = …, x before there was an x'
CALL_INPUT: Final = node("x", (), (TOKENS, HIDDEN))  # what a module is called with
CALL_OUTPUT: Final = node("y", (), (TOKENS, HIDDEN))  # what the call gives
CALL_ORIGIN: Final = node("x0", (), (TOKENS, HIDDEN))
MERGED: Final = node("merged", (), (OUT, IN))  # W', as the inverse sees it


def walk(root: Expr) -> Iterator[Expr]:
    """Every node below and including `root`, once each, arguments first."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(root, False)]
    while stack:
        expr, ready = stack.pop()
        if ready:
            yield expr
        elif expr not in seen:
            seen.add(expr)
            stack.append((expr, True))
            stack.extend((a, False) for a in reversed(expr.args))


def depends_on(root: Expr, leaf: Expr) -> bool:
    """Whether `leaf` occurs in `root`."""
    return any(e is leaf for e in walk(root))


_SIGNS = {"add": "+", "shift": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@"}
_NAMES = {"weight": "W", "bias": "b", "merged": "W'", "x": "x", "y": "y", "x0": "x0", "zeros": "0"}
_SEEN = {"comoment": "comoment(x)", "moment": "moment(x)", "gradient": "gradient(W)"}
_LONGEST = 400


def render(root: Expr) -> str:
    """The expression as text, in the notation of methods; what is very long is left out as `…`."""
    texts: dict[Expr, str] = {}
    for expr in walk(root):
        texts[expr] = _rendered(expr, [_shortened(texts[a]) for a in expr.args])
    return texts[root]


def _shortened(text: str) -> str:
    # Parts that repeat would double the text at every level.
    return text if len(text) <= _LONGEST else "…"


def _rendered(expr: Expr, texts: list[str]) -> str:
    if expr.op == "number":
        return str(expr.attr("value"))
    if expr.op in ("parameter", "witness"):
        return expr.text("name")
    if expr.op in _NAMES:
        return _NAMES[expr.op]
    if expr.op in _SEEN:
        return _SEEN[expr.op]
    operands = [
        f"({t})" if a.op in _SIGNS or a.op == "neg" else t
        for t, a in zip(texts, expr.args, strict=True)
    ]
    if expr.op in _SIGNS:
        return f" {_SIGNS[expr.op]} ".join(operands)
    if expr.op == "neg":
        return f"-{operands[0]}"
    constants = [f"{n}={_constant(v)}" for n, v in expr.attrs]
    return f"{expr.op}({', '.join([*texts, *constants])})"


def _constant(value: Attribute) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))})"
    return f'"{value}"' if isinstance(value, str) else str(value)
