"""What an equation puts around a call: before what goes in, and behind what comes out."""

from __future__ import annotations

from torch import Tensor

from surgery.algebra.applying import Vector
from surgery.algebra.derive import Derived
from surgery.algebra.equations import Equations
from surgery.algebra.expr import number
from surgery.algebra.interpret import Interpreter, Unlowerable
from surgery.algebra.rules import substitute
from surgery.algebra.sums import difference


def entered(interpreter: Interpreter, equations: Equations, x: Tensor) -> Tensor | None:
    """What goes into a call instead of x [..., hidden]; None where x does."""
    kind, given = equations.kind, equations.input
    if given is None:
        return None
    known = {kind.origin: Vector(x, narrow=True)}
    return interpreter.activation(substitute(given, {kind.input: kind.origin}), known).tensor


def left(
    interpreter: Interpreter, derived: Derived, origin: Tensor, x: Tensor, y: Tensor
) -> Tensor | None:
    """What is given instead of y [..., hidden], which a call gave for x; None where y is.

    origin: x before anything was put in its place. Raises Unlowerable.
    """
    kind = derived.equations.kind
    every = {kind.origin: origin, kind.input: x, kind.output: y}
    known = {leaf: Vector(tensor, narrow=True) for leaf, tensor in every.items()}
    if not derived.beside:
        output = derived.equations.output
        return None if output is None else interpreter.activation(output, known).tensor
    total = known[kind.output]
    for factor, equations in derived.beside:
        if equations.input is not None:
            raise Unlowerable("x' is what the call is made with, and it is made once for all")
        change = difference(equations.output or kind.output, kind.output)
        if change is not None:
            moved = interpreter.change(change, dict(known))
            moved = interpreter.multiply(number(factor), moved) if factor != 1 else moved
            total = interpreter.add(total, moved, 1)
    return total.tensor
