"""How a change grows with the parameters that it is made of: as a product of some, or otherwise.

What is linear in each of k parameters becomes c times itself when each is multiplied by the k-th
root of c; so a number before such a change can be shared out among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from surgery.algebra.expr import Expr, walk
from surgery.algebra.rules import is_zero

_ANY = -1
"""The degree of zero, which is each."""

_Rule = Callable[[tuple[int, ...]], "int | None"]


@dataclass(frozen=True, slots=True)
class Share:
    """What a parameter takes of a number before a change.

    among: how many parameters the number is shared out among. signed: whether its sign is here.
    """

    among: int = 1
    signed: bool = True

    def of(self, number: float) -> float:
        """The number by which this parameter is multiplied."""
        root = abs(number) ** (1 / self.among)
        return -root if self.signed and number < 0 else root


def shares(changes: Iterable[Expr | None], names: Iterable[str]) -> Mapping[str, Share]:
    """For each name what it takes of a number before all the changes; None is no change.

    Each takes the whole of it where a change is no product of parameters, each of them once.
    """
    names = tuple(names)
    found = dict.fromkeys(names, Share())
    seen: set[str] = set()
    for change in changes:
        degrees = {} if change is None else {n: degree(change, n) for n in names}
        together = [n for n, d in degrees.items() if d != 0]
        if any(degrees[n] != 1 for n in together) or seen & {*together}:
            return dict.fromkeys(names, Share())
        seen |= {*together}
        found |= {n: Share(len(together), n == together[0]) for n in together}
    return found


def degree(root: Expr, name: str) -> int | None:
    """The power of t by which an expression grows when a parameter does by t; None for no such.

    -1 for zero, which grows by any.
    """
    known: dict[Expr, int | None] = {}
    for e in walk(root):
        known[e] = _degree(e, tuple(known[a] for a in e.args), name)
    return known[root]


def _degree(e: Expr, args: tuple[int | None, ...], name: str) -> int | None:
    if is_zero(e):
        return _ANY
    if e.op == "parameter":
        return int(e.text("name") == name)
    if all(d == 0 for d in args):
        return 0
    rule = _RULES.get(e.op)
    told = tuple(d for d in args if d is not None)
    return rule(told) if rule is not None and len(told) == len(args) else None


def _same(args: tuple[int, ...]) -> int | None:
    """Of a sum, whose summands grow alike."""
    degrees = {d for d in args if d != _ANY} or {_ANY}
    return degrees.pop() if len(degrees) == 1 else None


def _together(args: tuple[int, ...]) -> int:
    return _ANY if _ANY in args else sum(args)


def _over(args: tuple[int, ...]) -> int | None:
    above, below = args
    return above if below == 0 else None


_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(("add", "sub", "shift", "concat"), _same),
    **dict.fromkeys(("matmul", "mul", "kron", "scale_rows", "scale_cols", "scale"), _together),
    **dict.fromkeys(("neg", "transpose", "tile", "repeat", "rearrange", "slice"), _same),
    **dict.fromkeys(("diag", "blockdiag", "circulant", "channelwise", "skew"), _same),
    "div": _over,
}
