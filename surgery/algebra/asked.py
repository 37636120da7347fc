"""Calls for what is not in the method: what data shows, random numbers, what all sites tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from surgery.algebra.axes import Size, size, symbol
from surgery.algebra.equations import COUNTS, ENDING, Share, Total
from surgery.algebra.expr import Expr
from surgery.algebra.observed import DRAWN, SIGHTS, gaussian, sight
from surgery.algebra.shapes import show
from surgery.algebra.tensors import Tensors
from surgery.errors import refuse
from surgery.language import syntax as ast


class Asking(Tensors):
    """Expressions of tensors, and such calls; see `observed` for what they stand for."""

    def __init__(self, *given: Any) -> None:
        """Evaluate as `Tensors` does."""
        super().__init__(*given)
        self.shares: list[Share] = []
        self.totals: list[Total] = []
        self.endings: list[str] = []
        self.changing = ""
        self._drawn = 0

    def call(self, expr: ast.Call) -> object:
        """Such a call, or any other."""
        asked = _ASKED.get(expr.function)
        return super().call(expr) if asked is None else asked(self, expr)

    def changed(self, item: ast.Equation) -> Size:
        """`r' = …`: what an argument becomes when its share is known; `among` stands in it alone.

        Raises DefinitionError.
        """
        self.changing = item.target
        try:
            return self.size(item.value)
        finally:
            self.changing = ""

    def sight(self, expr: ast.Call) -> Expr:
        """`comoment(x)`, `gradient(W)`: what data shows of one thing."""
        subject = "W" if SIGHTS[expr.function].of.op == "weight" else "x"
        (given,) = self._given(expr, 1, f"{expr.function}({subject})")
        if self(given) is not SIGHTS[expr.function].of:
            refuse(
                "E104",
                f"{expr.function}() is asked of {subject}",
                given.span,
                hint=f"write {expr.function}({subject})",
            )
        return sight(expr.function)

    def drawn(self, expr: ast.Call) -> Expr:
        """`gaussian(m, n)`: numbers of its own each time that it is written."""
        rows, columns = (self.size(a) for a in self._given(expr, 2, f"{DRAWN}(rows, columns)"))
        self._drawn += 1
        return gaussian(rows, columns, self._drawn)

    def among(self, expr: ast.Call) -> Size:
        """`among(v, n)`: how many of v are among the largest of all sites, n a site."""
        scores, count = self._given(expr, 2, "among(v, n)")
        self._check_changing(expr)
        return self._shared(expr, self._vector(scores), self.size(count))

    def kept(self, expr: ast.Call) -> Size:
        """`kept(E)`: how many elements of a trained vector an allocation leaves."""
        (given,) = self._given(expr, 1, "kept(v)")
        self._check_changing(expr)
        vector = self._vector(given)
        if vector.op != "parameter":
            hint = "as in `train E[r] = 0; r' = kept(E)`"
            refuse("E104", "kept() takes a trained vector", given.span, hint=hint)
        return self._shared(expr, vector, None)

    def total(self, expr: ast.Call) -> Size:
        """`total(n)`, `before(n)`, `place()`: the sum of n over all sites, or those before this."""
        every = expr.function == "place"
        term = self._given(expr, 0 if every else 1, f"{expr.function}({'' if every else 'n'})")
        self._check_changing(expr)
        # No name of a method has a space in it.
        name = f"{expr.function} {len(self.totals) + 1}"
        counted = size(1) if every else self.size(term[0])
        self.totals.append(Total(name, counted, expr.function != "total", every))
        return size(symbol(name))

    def ending(self, expr: ast.Call) -> object:
        """`ending()` where it is not all that an argument becomes."""
        self._check_changing(expr)
        refuse(
            "E103",
            "ending() is a text, and nothing is made of it",
            expr.span,
            hint=f"let it stand alone: `{self.changing}' = ending()`",
        )

    def _vector(self, expr: ast.Expression) -> Expr:
        value = self.tensor(expr)
        if len(value.shape) != 1:
            refuse(
                "E108", "a vector is needed here", expr.span, label=f"this is {show(value.shape)}"
            )
        return value

    def _shared(self, expr: ast.Call, scores: Expr, count: Size | None) -> Size:
        known = next((s for s in self.shares if (s.scores, s.count) == (scores, count)), None)
        if known is None:
            # No name of a method has a space in it.
            known = Share(f"{expr.function} {len(self.shares) + 1}", scores, count)
            self.shares.append(known)
        return size(symbol(known.name))

    def _check_changing(self, expr: ast.Call) -> None:
        if not self.changing:
            refuse(
                "E138",
                f"{expr.function}() is known only after the sites are",
                expr.span,
                hint=f"it says what an argument becomes: `r' = {expr.span.text}`",
            )

    def _given(self, expr: ast.Call, count: int, form: str) -> tuple[ast.Expression, ...]:
        if len(expr.arguments) != count or expr.keywords:
            wanted = ("no arguments", "one argument", f"{count} arguments")[min(count, 2)]
            refuse("E104", f"{expr.function}() takes {wanted}", expr.span, hint=f"write {form}")
        return expr.arguments


_ASKED: Mapping[str, Callable[[Asking, ast.Call], object]] = {
    **dict.fromkeys(SIGHTS, Asking.sight),
    DRAWN: Asking.drawn,
    "among": Asking.among,
    "kept": Asking.kept,
    **dict.fromkeys(COUNTS, Asking.total),
    ENDING: Asking.ending,
}
