"""One method after another at a site: the second's W, b, x and y are those the first leaves.

What comes of it is again one set of equations, so all that is derived from a method is derived
from a chain of them as well.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from surgery.algebra.derive import Derived, derive
from surgery.algebra.equations import Equations, Parameter
from surgery.algebra.expr import (
    BIAS,
    WEIGHT,
    Expr,
    depends_on,
    parameter,
    walk,
)
from surgery.algebra.interpret import mixes_output
from surgery.algebra.observed import seen_by
from surgery.algebra.ops import through
from surgery.algebra.rules import make, rebuild, substitute
from surgery.algebra.tensors import MAX_DEPTH

MAX_LINKS = 16
"""Each link may read W' of all before it, so the whole grows faster than the chain."""


class Unchained(Exception):
    """Equations that cannot follow those before them; the message is the reason.

    link: which of the equations it is that cannot follow.
    """

    link = 1


@lru_cache(maxsize=512)
def composed(links: tuple[Equations, ...]) -> Equations:
    """The equations of a chain; the parameters of its k-th link, k from 2 on, are numbered k.

    Raises Unchained with the first link that cannot follow.
    """
    if len(links) > MAX_LINKS:
        obstacle = Unchained(f"a chain has at most {MAX_LINKS} methods")
        obstacle.link = MAX_LINKS
        raise obstacle
    whole = links[0]
    for index, link in enumerate(links[1:], 1):
        taken = {p.name for p in whole.parameters}
        numbered = renamed(link, _suffix(index + 1, link, taken))
        parameters = tuple(replace(p, link=index) for p in numbered.parameters)
        try:
            _check_asks(whole, link)
            whole = chained(whole, replace(numbered, parameters=parameters))
        except Unchained as obstacle:
            obstacle.link = index
            raise
    return whole


def _check_asks(first: Equations, second: Equations) -> None:
    """Refuse what is asked of a site with one method alone."""
    if any(share.count is not None for share in (*first.shares, *second.shares)):
        raise Unchained("among() shares out an argument of a method that is alone at its sites")
    if seen_by(second):
        raise Unchained("it begins with what data shows of the base, and here it sees another W")
    if any(
        p.shared and isinstance(p.beginning, Expr) and p.beginning.args for p in second.parameters
    ):
        raise Unchained(
            "what it shares begins with the W of all its sites, and here it sees another"
        )


def _suffix(number: int, link: Equations, taken: set[str]) -> str:
    suffix = f"_{number}"
    while any(f"{p.name}{suffix}" in taken for p in link.parameters):
        suffix += "_"
    return suffix


# ------------------------------------------------------------------------------------- names


def renamed(equations: Equations, suffix: str) -> Equations:
    """The same equations with `suffix` behind the name of each parameter.

    What they drop at random is their own, and none of what equal equations drop.
    """
    names = {
        parameter(p.name, p.shape): parameter(f"{p.name}{suffix}", p.shape)
        for p in equations.parameters
    }
    roots = [e for e in _targets(equations) if e is not None]
    drops = {e for root in roots for e in walk(root) if e.op == "drop"}
    own = {e: make("drop", **{**dict(e.attrs), "of": f"{_tag(e)}{suffix}"}) for e in drops}

    def again(expr: Expr | None) -> Expr | None:
        return None if expr is None else substitute(expr, {**names, **own})

    return Equations(
        tuple(_renamed(p, suffix, names) for p in equations.parameters),
        *map(again, _targets(equations)),
        joins=equations.joins,
        kind=equations.kind,
    )


def _tag(drop: Expr) -> object:
    return dict(drop.attrs).get("of", "")


def _renamed(p: Parameter, suffix: str, names: dict[Expr, Expr]) -> Parameter:
    begins = p.beginning
    return replace(
        p,
        name=f"{p.name}{suffix}",
        beginning=substitute(begins, dict(names)) if isinstance(begins, Expr) else begins,
        declared=p.declared_name,
        of=f"{p.of}{suffix}" if p.of else "",
    )


def _targets(equations: Equations) -> tuple[Expr | None, Expr | None, Expr | None, Expr | None]:
    return equations.weight, equations.bias, equations.input, equations.output


# ------------------------------------------------------------------------------- two equations


def chained(first: Equations, second: Equations) -> Equations:
    """The site with `first`, and `second` on it; their parameters have distinct names.

    Raises Unchained where `second` reads W or b and `first`, which is not affine in x, has none to
    give, and where something that `first` drops at random would be read as a value.
    """
    if first.kind is not second.kind:
        others = f"it is on a {second.kind.name}, and what is before it on a {first.kind.name}"
        raise Unchained(others)
    made = _on_weights(first, second) if _reads_weights(second) else _around(first, second)
    begun = tuple(_begun(p, first) for p in second.parameters)
    _check_depth(made)
    return replace(made, parameters=(*first.parameters, *begun))


def _reads_weights(second: Equations) -> bool:
    if second.weight is not None or second.bias is not None:
        return True
    return any(map(_reads, (second.input, second.output)))


def _reads(expr: Expr | None) -> bool:
    """Whether W or b is in an expression."""
    return expr is not None and (depends_on(expr, WEIGHT) or depends_on(expr, BIAS))


def _begun(p: Parameter, first: Equations) -> Parameter:
    """A parameter that begins as the site with `first` is when that begins."""
    if not (isinstance(p.beginning, Expr) and _reads(p.beginning)):
        return p
    return replace(p, beginning=_Site(first).value(p.beginning))


def _check_depth(made: Equations) -> None:
    deepest = max((e.depth for e in _targets(made) if e is not None), default=0)
    if deepest > MAX_DEPTH:
        raise Unchained(f"with all that is before it, it nests deeper than {MAX_DEPTH}")


def _around(first: Equations, second: Equations) -> Equations:
    """`second` before the input and behind the output of `first`, whose weights it never reads."""
    kind = first.kind
    given = second.input or kind.input
    # In y' = …, x is x'. Where `first` has an x' of its own, that of `second` is made of what came.
    seen = kind.input
    if first.input is not None:
        seen = substitute(given, {kind.input: kind.origin})
    output = first.output
    if output is not None:
        output = substitute(output, {kind.origin: seen})
    if second.output is not None:
        replaced = {kind.input: seen, kind.output: output or kind.output}
        output = substitute(second.output, replaced)
    made = substitute(first.input or kind.input, {kind.input: given})
    return replace(
        first,
        input=None if made is kind.input else made,
        output=None if output is kind.output else output,
        joins=first.joins or second.joins,
    )


def _on_weights(first: Equations, second: Equations) -> Equations:
    """`second` on the W' and b' that `first` comes to."""
    site = _Site(first)
    weight = site.matrix(second.weight or WEIGHT)
    bias = site.value(second.bias or BIAS)
    return Equations(
        (),
        weight=None if weight is WEIGHT else weight,
        bias=None if bias is BIAS else bias,
        input=None if second.input is None else site.activation(second.input),
        output=None if second.output is None else site.activation(second.output),
        joins=first.joins or second.joins or mixes_output(first.output),
    )


class _Site:
    """What the site with some equations has for W and b; expressions over W and b, seen there."""

    def __init__(self, first: Equations) -> None:
        """Raises Unchained where there is no W' and b'."""
        derived = derive(first, has_bias=True)
        if derived.merged is None or derived.still is None:
            raise Unchained(f"it reads W or b, and there is no W' before it: {derived.reason}")
        if derived.noisy:
            raise Unchained("it reads W or b, and the noise before it is no part of W'")
        if _random(derived.merged.bias):
            raise Unchained("it reads W or b, and drop(p) before it drops something of b")
        self._weight = derived.merged.weight
        self._values = _values(derived)
        self._applied: dict[Expr, Expr] = {WEIGHT: self._weight}

    def value(self, expr: Expr) -> Expr:
        """What is needed as a value: in it, nothing is dropped."""
        return substitute(expr, dict(self._values))

    def matrix(self, expr: Expr) -> Expr:
        """What is applied to a vector, on whose way something may be dropped. Raises Unchained."""
        if len(expr.shape) < 2:
            return self.value(expr)
        if expr not in self._applied:
            ways = through(expr) or ()
            args = [
                self.matrix(arg) if index in ways else self._factor(arg)
                for index, arg in enumerate(expr.args)
            ]
            self._applied[expr] = rebuild(expr, tuple(args))
        return self._applied[expr]

    def activation(self, expr: Expr) -> Expr:
        """An equation of x and y; `x @ M` applies Mᵀ. Raises Unchained."""
        if expr not in self._applied:
            args = list(expr.args)
            for index, arg in enumerate(args):
                if arg.is_activation:
                    args[index] = self.activation(arg)
                elif expr.op == "matmul" and index == 1 and len(arg.shape) > 1:
                    args[index] = make("transpose", self.matrix(make("transpose", arg)))
                else:
                    args[index] = self._factor(arg)
            self._applied[expr] = rebuild(expr, tuple(args))
        return self._applied[expr]

    def _factor(self, expr: Expr) -> Expr:
        """A value beside what is applied; of a matrix nothing can be left undropped in silence."""
        if len(expr.shape) > 1 and depends_on(expr, WEIGHT) and _random(self._weight):
            raise Unchained(
                "it builds a matrix from W, so what drop(p) before it drops would not be dropped"
            )
        return self.value(expr)


def _values(derived: Derived) -> dict[Expr, Expr]:
    assert derived.still is not None
    return {WEIGHT: derived.still.weight, BIAS: derived.still.bias}


def _random(expr: Expr) -> bool:
    return any(e.op == "drop" for e in walk(expr))


__all__ = ["Unchained", "chained", "composed", "renamed"]
