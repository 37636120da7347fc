"""Which tokens of a text an equation is for: what stands behind `at` in a statement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, cast

from surgery.algebra.scalars import Open, did_you_mean
from surgery.errors import refuse
from surgery.language import syntax as ast

PlaceKind = Literal["first", "last", "at", "after"]


@dataclass(frozen=True, slots=True)
class Places:
    """Which tokens of a text are meant.

    kind, numbers: the `first` or the `last` of one number; those `at` some places, negative from
    the end; those `after` the start of some tokens' ids.
    """

    kind: PlaceKind
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        """As a statement has it."""
        numbers = ", ".join(map(str, self.numbers))
        return f"[{numbers}]" if self.kind == "at" else f"{self.kind}({numbers})"


UNMERGED = "it is for some of the tokens alone, and a weight is for all"
"""Why what is at some places is in no weight."""

_NAMED: dict[str, PlaceKind] = {"first": "first", "last": "last", "after": "after", "": "at"}
_COUNTED = ("first", "last")


Ids = Callable[[str], Sequence[int]]
"""The ids of a text's tokens."""


def places_of(
    calls: Sequence[ast.Call],
    value: Callable[[ast.Expression], object],
    ids: Ids | None = None,
) -> tuple[Places, ...]:
    """The places that a statement says; `value` evaluates an expression. Raises DefinitionError.

    ids: those of a text, where a tokenizer is known. E143 for what says no place; what is not known
    yet is taken for 1.
    """
    return tuple(_place(call, value, ids) for call in calls)


def shown(places: Sequence[Places]) -> str:
    """As a statement has them; "" for all tokens."""
    return f" at {' | '.join(map(str, places))}" if places else ""


def stated_place(data: object) -> Places | None:
    """The places that plain data says, `["first", 5]`; None where it says none."""
    if not isinstance(data, list):
        return None
    kind, *numbers = cast("list[object]", data) or [None]
    whole = [n for n in numbers if type(n) is int]
    if kind not in _NAMED.values() or len(whole) != len(numbers):
        return None
    found = Places(cast(PlaceKind, kind), tuple(whole))
    return None if _objection(found) else found


def _place(call: ast.Call, value: Callable[[ast.Expression], object], ids: Ids | None) -> Places:
    kind = _NAMED.get(call.function)
    if kind is None:
        spelled = [name for name in _NAMED if name]
        _refuse(call, f"`{call.function}` says no places", did_you_mean(call.function, spelled))
    if call.keywords:
        _refuse(call, f"{call.function}() takes numbers")
    given = [value(argument) for argument in call.arguments]
    numbers = tuple(number for one in given for number in _numbers(call, one, ids))
    found = Places(kind, numbers)
    objection = _objection(found)
    if objection:
        _refuse(call, objection)
    return found


def _objection(places: Places) -> str:
    """What is wrong with the numbers of some places, or ""."""
    kind, numbers = places.kind, places.numbers
    if kind in _COUNTED and (len(numbers) != 1 or numbers[0] < 1):
        return f"{kind}() takes one number above 0"
    if kind == "after" and (not numbers or min(numbers) < 0):
        return "after() takes the ids of some tokens"
    return "" if numbers else "no place is said"


def _numbers(call: ast.Call, found: object, ids: Ids | None) -> Sequence[int]:
    """What stands between the brackets: a number, or a text for the ids of its tokens."""
    if isinstance(found, Open):
        return (1,)
    if isinstance(found, str) and call.function == "after":
        if ids is None:
            _refuse(call, "a text has no ids without a tokenizer", _IDS)
        return ids(found)
    if not isinstance(found, int) or isinstance(found, bool):
        _refuse(call, f"{found!r} is no whole number")
    return (found,)


_IDS = "compile(…, tokenizer=…), or take the ids that it gives: `after(101, 2023)`"
_FORMS = "there are: first(n), last(n), [0, -1], after(ids)"


def _refuse(call: ast.Call, message: str, hint: str = "") -> NoReturn:
    refuse("E143", message, cast(ast.Node, call).span, hint=hint or _FORMS)
