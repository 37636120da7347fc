"""Both ways of every condition that is still open, one run after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from surgery.algebra.scalars import Decide
from surgery.language import syntax as ast

MAX_WAYS = 64

Facts = Mapping[ast.Expression, bool]


def each_way(run: Callable[[Decide], None], most: int = MAX_WAYS) -> bool:
    """Run once for each way of deciding what is open; False if there are more than `most`.

    A condition has one answer in a run, and two equations of one name with different texts or
    numbers are never both taken to hold. The first run takes every condition to hold; those that
    take one alone not to hold come next, so that no branch waits long for its turn.
    """
    pending: deque[Facts] = deque([{}])
    for _ in range(most):
        if not pending:
            return True
        run(_decider(pending.popleft(), pending))
    return not pending


def _decider(facts: Facts, pending: deque[Facts]) -> Decide:
    taken = dict(facts)

    def decide(condition: ast.Expression) -> bool:
        known = _known(condition, taken)
        if known is None:
            pending.append({**taken, condition: False})
            known = True
        taken[condition] = known
        return known

    return decide


def _known(condition: ast.Expression, facts: Facts) -> bool | None:
    """What earlier answers say of a condition; None if nothing."""
    if condition in facts:
        return facts[condition]
    asked = _equation(condition)
    if asked is None:
        return None
    name, value, positive = asked
    for other, answer in facts.items():
        fact = _equation(other)
        if fact is None or fact[0] != name:
            continue
        holds = answer is fact[2]  # whether name == fact[1]
        if holds:
            return (fact[1] == value) is positive
        if fact[1] == value:
            return not positive
    return None


def _equation(condition: ast.Expression) -> tuple[str, str | float | bool, bool] | None:
    """`name == value` or `name != value` as name, value, and whether it is the former."""
    match condition:
        case ast.Binary(
            "==" | "!=" as sign, ast.Name(name), ast.Number() | ast.Text() | ast.Truth()
        ):
            literal = condition.right
        case ast.Binary(
            "==" | "!=" as sign, ast.Number() | ast.Text() | ast.Truth(), ast.Name(name)
        ):
            literal = condition.left
        case _:
            return None
    assert isinstance(literal, ast.Number | ast.Text | ast.Truth)
    return name, literal.value, sign == "=="
