"""Adapters that one graph computes: equations that differ in sizes and numbers alone.

A method at rank 8 with alpha 16, and the same at rank 3, are one equation over tensors of the
larger rank, filled up with zeros, and over a number that is a tensor. Which arguments may differ so
is found out: the equations are made with another size, compared node by node, and tried on filled
up parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from surgery.algebra.axes import Size, evaluate, names_in, symbol
from surgery.algebra.derive import derive
from surgery.algebra.elaborate import asks_sizes
from surgery.algebra.equations import Equations, Parameter
from surgery.algebra.expr import Expr, number, parameter, walk
from surgery.algebra.interpret import Domain, Evaluator
from surgery.algebra.rules import substitute
from surgery.arguments import Arguments, Link
from surgery.errors import SurgeryError
from surgery.fit import equations_at
from surgery.site_class import SiteClass

_NUMBER = "number_"  # no name of a method's begins with what stands before a digit here
_SIDES = ("weight", "bias", "input", "output")


@dataclass(frozen=True)
class Family:
    """What the members at sites that are alike have in common.

    form: a class of sites with the largest sizes, whose numbers are parameters of no axes.
    equations: the same with the numbers in it. numbers: of these, by the parameters' names.
    open: the arguments that members may differ in, as symbols. largest: those that are sizes.
    """

    form: SiteClass
    equations: Equations
    numbers: tuple[tuple[str, Expr], ...]
    open: tuple[str, ...]
    largest: tuple[tuple[str, int], ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters of the members by their names, without the numbers."""
        known = {name for name, _ in self.numbers}
        return tuple(p.name for p in self.form.parameters if p.name not in known)

    def __hash__(self) -> int:
        """As its parts."""
        return hash((self.form, self.open, self.largest))


def family_of(form: SiteClass, most: int) -> Family | str:
    """The family of a class of sites, with sizes up to some rank; or why it has none."""
    reason = _objection(form)
    if reason:
        return reason
    (link,) = form.links
    open_ = tuple(name for name, value in link.arguments if _opens(form, link, name, value))
    largest: dict[str, int] = {}
    for name, value in link.arguments:
        if 0 < _count(value) <= most and _fills(form, link, open_, {**largest, name: most}):
            largest[name] = most
    return _family(form, link, open_, largest)


def values_of(family: Family, form: SiteClass) -> Mapping[str, float] | None:
    """The numbers of a member by the names of the family's parameters; None for no member."""
    if _objection(form) or len(form.links) != 1 or not _alike(family.form, form):
        return None
    (link,) = form.links
    arguments = dict(link.arguments)
    if any(_count(arguments.get(name)) > size for name, size in family.largest):
        return None
    own = _equations(form, link, family.open, {})
    pairs = None if own is None else _paired(family.equations, own)
    if pairs is None or not _shapes_fit(family, form):
        return None
    leaves = {expr for _, expr in family.numbers}
    if any(one is not two for one, two in pairs.items() if one not in leaves):
        return None
    names = {**form.names, **{name: _number(arguments[name]) for name in family.open}}
    return {name: _value(pairs.get(expr, expr), names) for name, expr in family.numbers}


def filled(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A parameter with zeros behind its own entries, up to a shape."""
    missing = [large - small for small, large in zip(value.shape, shape, strict=True)]
    pads = [pad for count in reversed(missing) for pad in (0, count)]
    return functional.pad(value, pads) if any(missing) else value


# ------------------------------------------------------------------------------- what is in one


def _objection(form: SiteClass) -> str:
    """Why a class of sites is not computed sample by sample."""
    checks = (
        (len(form.links) != 1, "a chain of methods is not stacked"),
        (form.mode == "around", "it is around a call, and on no weight"),
        (form.mode != "call" or form.batch is not None, "its layer is not called by itself"),
        (not form.at.whole or bool(form.kind.packed), "it is a part of its layer, or quantised"),
        (any(p.shared for p in form.parameters), "it shares parameters with other sites"),
        (any(p.whole for p in form.parameters), "its parameters are places"),
        (form.derived.still is None, "it has no merged weight to try it on"),
        (form.derived.noisy, "it is random in training"),
    )
    return next((reason for wrong, reason in checks if wrong), "")


def _opens(form: SiteClass, link: Link, name: str, value: object) -> bool:
    """Whether an argument is a number in the equations, and decides nothing else."""
    declared = next((a for a in link.method.arguments if a.name == name), None)
    if value is None or declared is None or declared.type != "float":
        return False
    found = _equations(form, link, (name,), {})
    if found is None:
        return False
    every = [e for side in _SIDES for e in _walked(found, side)]
    with_symbol = [e for e in every if _has_symbol(e, name)]
    return all(e.op == "number" for e in with_symbol)


def _has_symbol(expr: Expr, name: str) -> bool:
    return any(isinstance(v, Size) and name in names_in(v) for _, v in expr.attrs)


def _fills(form: SiteClass, link: Link, open_: tuple[str, ...], largest: Mapping[str, int]) -> bool:
    """Whether parameters of larger sizes with zeros in them compute the same."""
    large, own = _equations(form, link, open_, largest), _equations(form, link, open_, {})
    if large is None or own is None or _paired(large, own) is None:
        return False
    shapes = [_shapes(form, e) for e in (large, own)]
    if shapes[0].keys() != shapes[1].keys() or shapes[0] == shapes[1]:
        return False
    if not all(_fits(shapes[1][n], shapes[0][n]) for n in shapes[0]):
        return False
    return _computes_the_same(_family(form, link, open_, largest), form)


def _family(
    form: SiteClass, link: Link, open_: tuple[str, ...], largest: Mapping[str, int]
) -> Family:
    equations = _equations(form, link, open_, largest)
    assert equations is not None
    other = {name: max(1, size // 2) for name, size in largest.items()}
    pairs = _paired(equations, _equations(form, link, open_, other) or equations) or {}
    every = dict.fromkeys(e for side in _SIDES for e in _walked(equations, side))
    numbers = [e for e in every if e.op == "number" and _varies(e, pairs, open_)]
    named = tuple((f"{_NUMBER}{index}", expr) for index, expr in enumerate(numbers))
    leaves = {expr: parameter(name, ()) for name, expr in named}
    own = tuple(replace(p, beginning=number(0)) for p in equations.parameters)
    beside = tuple(Parameter(name, (), number(0), False, False, own[0].span) for name, _ in named)
    sides = {s: _replaced(getattr(equations, s), leaves) for s in _SIDES}
    made = replace(equations, parameters=(*own, *beside), **sides)
    derived = derive(made, form.has_bias)
    return Family(
        replace(form, links=(), derived=derived), equations, named, open_, tuple(largest.items())
    )


def _replaced(expr: Expr | None, leaves: dict[Expr, Expr]) -> Expr | None:
    return None if expr is None else substitute(expr, leaves)


def _varies(expr: Expr, pairs: Mapping[Expr, Expr], open_: tuple[str, ...]) -> bool:
    return any(_has_symbol(expr, name) for name in open_) or pairs.get(expr, expr) is not expr


@lru_cache(maxsize=4096)
def _made(form: SiteClass, link: Link) -> Equations | None:
    try:
        return equations_at(form, link)
    except SurgeryError:  # a condition that a symbol does not decide, a size that does not fit
        return None


def _equations(
    form: SiteClass, link: Link, open_: tuple[str, ...], sizes: Mapping[str, int]
) -> Equations | None:
    """The equations with some arguments left open, and others of other sizes."""
    return _made(form, replace(link, arguments=_with(link.arguments, open_, sizes)))


def _with(arguments: Arguments, open_: tuple[str, ...], sizes: Mapping[str, int]) -> Arguments:
    return tuple(
        (name, symbol(name) if name in open_ else sizes.get(name, value))
        for name, value in arguments
    )


# ------------------------------------------------------------------------------------ compared


def _walked(equations: Equations, side: str) -> Iterator[Expr]:
    root: Expr | None = getattr(equations, side)
    return iter(()) if root is None else walk(root)


def _paired(one: Equations, other: Equations) -> dict[Expr, Expr] | None:
    """The numbers of one with those of the other; None where more differs than these and sizes."""
    found: dict[Expr, Expr] = {}
    if [p.name for p in one.parameters] != [p.name for p in other.parameters]:
        return None
    for side in _SIDES:
        a, b = getattr(one, side), getattr(other, side)
        if (a is None) != (b is None) or (a is not None and not _same(a, b, found, set())):
            return None
    return found


def _same(a: Expr, b: Expr, numbers: dict[Expr, Expr], seen: set[tuple[Expr, Expr]]) -> bool:
    if (a, b) in seen:
        return True
    seen.add((a, b))
    if a.op == "number" and b.op == "number":
        return numbers.setdefault(a, b) is b
    if a.op != b.op or len(a.args) != len(b.args):
        return _times_one(a, b, numbers, seen)
    if a.op == "parameter" and a.text("name") != b.text("name"):
        return False
    return all(_same(x, y, numbers, seen) for x, y in zip(a.args, b.args, strict=True))


def _times_one(a: Expr, b: Expr, numbers: dict[Expr, Expr], seen: set[tuple[Expr, Expr]]) -> bool:
    """Whether they are the same but for a number in the first that is 1 in the other."""
    if a.op != "mul" or a.args[0].op != "number" or numbers.get(a.args[0], _ONE) is not _ONE:
        return False
    numbers[a.args[0]] = _ONE
    return _same(a.args[1], b, numbers, seen)


_ONE = number(1)


def _alike(one: SiteClass, other: SiteClass) -> bool:
    fields = ("kind", "sizes", "geometry", "has_bias", "base_dtype", "dtype", "at", "mode")
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def _shapes(form: SiteClass, equations: Equations) -> dict[str, tuple[int, ...]]:
    return {p.name: form.numbers(p.shape) for p in equations.parameters}


def _shapes_fit(family: Family, form: SiteClass) -> bool:
    large = family.form.shapes
    return all(_fits(form.shapes[name], large[name]) for name in family.parameters)


def _fits(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return len(small) == len(large) and all(s <= t for s, t in zip(small, large, strict=True))


def _count(value: object) -> int:
    """A whole number that could be a size; 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _number(value: object) -> float:
    return float(evaluate(value, {})) if isinstance(value, Size) else float(str(value))


def _value(expr: Expr, names: Mapping[str, float]) -> float:
    size = expr.attr("value")
    assert isinstance(size, Size)
    return float(evaluate(size, names))


# --------------------------------------------------------------------------------------- tried


def _computes_the_same(family: Family, form: SiteClass) -> bool:
    """Whether W' is the same for a member's parameters and for the same with zeros behind them."""
    numbers = values_of(family, form)
    if numbers is None:
        return False
    names: dict[str, int | float] = dict(form.names)
    if not asks_sizes(form.links[0].method):  # any will do
        names |= {"in": min(names["in"], 24), "out": min(names["out"], 20), "channels": 24}
        names["channels"] = min(names["channels"], names["in"])
    small, large = (_sized(f, names) for f in (form, family.form))
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in small.items()}
    weight = torch.randn(
        (int(names["out"]), int(names["in"])), generator=generator, dtype=torch.float64
    )
    full = {n: filled(v, large[n]) for n, v in drawn.items()}
    full |= {n: torch.tensor(v, dtype=torch.float64) for n, v in numbers.items()}
    try:
        one = _weight(form, drawn, weight, names)
        other = _weight(family.form, full, weight, names)
    except RuntimeError:  # an operator that those sizes do not suit
        return False
    return bool(torch.isfinite(other).all()) and torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def _sized(form: SiteClass, names: Mapping[str, int | float]) -> dict[str, tuple[int, ...]]:
    return {p.name: tuple(int(evaluate(s, names)) for s in p.shape) for p in form.parameters}


def _weight(
    form: SiteClass, values: Mapping[str, Tensor], weight: Tensor, names: Mapping[str, int | float]
) -> Tensor:
    def leaf(expr: Expr) -> Tensor:
        match expr.op:
            case "parameter":
                return values[expr.text("name")]
            case "weight":
                return weight
            case _:
                return weight[:, 0]

    still = form.derived.still
    assert still is not None
    anchor: Callable[[], Tensor] = partial(weight.new_zeros, ())
    return Evaluator(Domain(names, leaf, anchor)).value(still.weight)
