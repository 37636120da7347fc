"""The kinds of site: what an equation can read there, and what it can give. A row each.

A kind is what stands behind `on` in a method. Its variables are leaves of expressions; what is made
of them is for the algebra as anything else is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from surgery.algebra.axes import Size
from surgery.algebra.expr import (
    BIAS,
    CALL_INPUT,
    CALL_ORIGIN,
    CALL_OUTPUT,
    CHANNELS,
    HIDDEN,
    IN,
    INPUT,
    ORIGIN,
    OUT,
    OUTPUT,
    WEIGHT,
    Expr,
)


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """One row.

    name: what stands behind `on`.
    sizes: the sizes of a site, by the names that they have in an equation.
    variables: what an equation reads of a site.
    targets: of those that an equation may give the field of `Equations` that has it.
    input, output: the activations; origin: the input as it came, where an equation gives another.
    unmerged: why what is put there is in no weight; "" where it can be.
    """

    name: str
    sizes: Mapping[str, Size]
    variables: Mapping[str, Expr]
    targets: Mapping[str, str]
    input: Expr = INPUT
    output: Expr = OUTPUT
    origin: Expr = ORIGIN
    unmerged: str = ""

    def __reduce__(self) -> tuple[Callable[[str], Kind], tuple[str]]:
        """As its name: there is one row of each."""
        return kind_named, (self.name,)

    @property
    def names(self) -> Mapping[str, object]:
        """What is known in an equation of a site, by name."""
        return {**self.sizes, **self.variables}

    @property
    def said(self) -> str:
        """What an equation may give, as a sentence has it."""
        *most, last = (f"{name}'" for name in self.targets)
        return f"{', '.join(most)} or {last}" if most else last


MATRIX = Kind(
    "matrix",
    sizes={"in": IN, "out": OUT, "channels": CHANNELS},
    variables={"W": WEIGHT, "b": BIAS, "x": INPUT, "y": OUTPUT},
    targets={"W": "weight", "b": "bias", "x": "input", "y": "output"},
)

CALL = Kind(
    "call",
    sizes={"hidden": HIDDEN},
    variables={"x": CALL_INPUT, "y": CALL_OUTPUT},
    targets={"x": "input", "y": "output"},
    input=CALL_INPUT,
    output=CALL_OUTPUT,
    origin=CALL_ORIGIN,
    unmerged="it changes what a call takes or gives, and no weight says that",
)

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (MATRIX, CALL)}
"""What a statement that applies methods can select sites for."""

SIZES = frozenset(name for kind in KINDS.values() for name in kind.sizes)
"""The sizes of sites of any kind."""


def beyond(name: str) -> str:
    """The name of a kind whose sites are nothing that a parameter holds; "" for any other."""
    kind = KINDS.get(name)
    return name if kind is not None and kind.unmerged else ""


def kind_named(name: str) -> Kind:
    """The row of a name; that of a matrix for one of none, which is reported elsewhere."""
    return KINDS.get(name, MATRIX)
