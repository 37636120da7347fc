"""Several equations at one site, each times a number and each seeing the base.

Σ cᵢ·aᵢ is W' = W + Σ cᵢ (Wᵢ' - W), and likewise b'. What is no matrix of x is mixed as it runs, as
y + Σ cᵢ (yᵢ' - y).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from surgery.algebra.derive import Derived, Inverse, Merged, completed, derive
from surgery.algebra.equations import Equations, Parameter
from surgery.algebra.expr import BIAS, WEIGHT, Expr, number, walk, zeros
from surgery.algebra.interpret import mixes_output
from surgery.algebra.rules import make
from surgery.algebra.sums import difference

Terms = tuple[tuple[float, Equations], ...]


@lru_cache(maxsize=512)
def mixed(terms: Terms, has_bias: bool) -> Derived:
    """All that follows from some equations, each times its number.

    Parameters of one name are one parameter.
    """
    match terms:
        case ((1, alone),):
            return derive(alone, has_bias)
        case _:
            known = [(factor, derive(equations, has_bias)) for factor, equations in terms]
    kind = terms[0][1].kind
    if kind.unmerged:
        return derive(Equations(_parameters(e for _, e in terms), kind=kind), has_bias, terms)
    straight = [(factor, d.merged) for factor, d in known if d.merged is not None and _runs(d)]
    beside = tuple((factor, d.equations) for factor, d in known if not _runs(d))
    part = _sum(straight, has_bias)
    joins = any(e.joins or mixes_output(e.output) for _, e in terms)
    equations = Equations(
        _parameters(e for _, e in terms),
        weight=None if part.weight is WEIGHT else part.weight,
        bias=None if part.bias is BIAS else part.bias,
        joins=joins,
    )
    reason = next((d.reason for _, d in known if d.merged is None), "")
    if reason:
        return Derived(equations, None, None, Inverse(None), reason, beside)
    whole = _sum([(factor, d.merged) for factor, d in known if d.merged is not None], has_bias)
    return completed(equations, whole, has_bias, beside)


def _runs(derived: Derived) -> bool:
    """Whether the merged weight and bias are what a forward applies."""
    if derived.merged is None or derived.noisy:
        return False
    return not any(e.op == "drop" for e in walk(derived.merged.bias))


def _parameters(equations: Iterable[Equations]) -> tuple[Parameter, ...]:
    found = {p.name: p for one in equations for p in one.parameters}
    return tuple(found.values())


def _sum(terms: list[tuple[float, Merged]], has_bias: bool) -> Merged:
    bias = BIAS if has_bias else zeros(BIAS.shape)
    return Merged(
        _plus(WEIGHT, [(factor, m.weight) for factor, m in terms]),
        _plus(bias, [(factor, m.bias) for factor, m in terms]),
    )


def _plus(base: Expr, terms: list[tuple[float, Expr]]) -> Expr:
    """The base, and by how much each of the others differs from it, times its number."""
    total = base
    for factor, changed in terms:
        change = difference(changed, base)
        if change is not None:
            sign = "sub" if factor < 0 else "add"
            total = make(sign, total, make("mul", number(abs(factor)), change))
    return total
