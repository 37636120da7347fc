"""The learning rate of a parameter: so many times another, or one of its own."""

from __future__ import annotations

from typing import NamedTuple

from surgery.algebra import scalars
from surgery.errors import Span, refuse

HINT = "write a number above 0, such as `16x` or `1e-4`"


class Rate(NamedTuple):
    """`16x`, so many times the learning rate that is given; `1e-4`, one in its place."""

    value: float
    times: bool

    def of(self, lr: float) -> float:
        """The learning rate, where another is given."""
        return self.value * lr if self.times else self.value

    def __str__(self) -> str:
        """As a spec has it, and reads it again."""
        short = f"{self.value:g}"
        text = short if float(short) == self.value else repr(self.value)
        return f"{text}x" if self.times else text


def rate(value: object, times: bool, span: Span) -> Rate | None:
    """The rate of a value that was computed; None while that is not known.

    Raises DefinitionError: E119 for what is no number, E139 for one that nothing is learnt at.
    """
    found = scalars.typed(scalars.plain(value), "float", "lr", span)
    if not isinstance(found, float):
        return None
    if not found > 0:
        refuse("E139", f"a learning rate of {found:g} is none", span, hint=HINT)
    return Rate(found, times)
