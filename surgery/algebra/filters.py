"""`where COND`: what it may ask about, and how it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NoReturn

from surgery.algebra.axes import symbol
from surgery.algebra.mentions import names as mentioned
from surgery.algebra.names import Names
from surgery.algebra.scalars import Open, Scalars, kind
from surgery.errors import refuse
from surgery.language import syntax as ast

WORDS = ("type", "name", "path", "dtype")
"""The facts that are texts: what one is compared with may be a bare word, `type == Linear`."""

FACTS: Mapping[str, object] = {
    **{word: Open(word, "text") for word in WORDS},
    **{name: symbol(name) for name in ("layer", "in", "out", "numel")},
    "tied": Open("tied", "bool"),
}
"""All that a `where` may ask about besides the names of the spec, as long as it is not known."""


class Filter(Scalars):
    """Evaluates a `where` over the names of a spec and the facts of a candidate."""

    def binary(self, expr: ast.Binary) -> object:
        """Arithmetic, comparison and logic; a word beside a fact that is a text is one too."""
        if expr.operator in ("==", "!="):
            left, right = self._word(expr.left, expr.right), self._word(expr.right, expr.left)
            expr = replace(expr, left=left, right=right)
        return super().binary(expr)

    def operate(self, expr: ast.Binary, left: object, right: object) -> object:
        """Arithmetic and comparison; a text beside what is none can never be equal (E103)."""
        if expr.operator in ("==", "!="):
            for side, value, other in ((expr.left, left, right), (expr.right, right, left)):
                if _is_text(other) and not (_is_text(value) or _is_open(value)):
                    _refuse_other(side, value)
        return super().operate(expr, left, right)

    def _word(self, side: ast.Expression, other: ast.Expression) -> ast.Expression:
        text = isinstance(other, ast.Name) and other.id in WORDS
        if text and isinstance(side, ast.Name) and side.id not in self.names:
            return ast.Text(side.id, span=side.span)
        return side


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Open) and value.type == "text")


def _is_open(value: object) -> bool:
    return isinstance(value, Open) and value.type is None


def _refuse_other(side: ast.Expression, value: object) -> NoReturn:
    shown = side.span.text
    word = isinstance(side, ast.Name | ast.Number)
    hint = f'a text stands in quotes: `"{shown}"`' if word else "compare it with a text"
    refuse("E103", "a text is needed here", side.span, label=f"this is {kind(value)}", hint=hint)


def asks(where: ast.Expression, names: Names) -> frozenset[str]:
    """The facts that a condition asks about, by itself and through the lets of the spec."""
    return frozenset(_reached(where, names)) & FACTS.keys()


def _reached(where: ast.Expression, names: Names) -> Iterator[str]:
    seen: set[str] = set()
    waiting = [*mentioned(where)]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        yield name
        if name in names.lets and name not in FACTS:
            waiting += mentioned(names.lets[name].value)
