"""What a declaration of a parameter may be: its sizes, whole numbers, what all sites share."""

from __future__ import annotations

from typing import cast

from surgery.algebra import scalars
from surgery.algebra.axes import Size, names_in, size
from surgery.algebra.bases import COMMON
from surgery.algebra.beginnings import AFTER, PAIRS, Distribution
from surgery.algebra.equations import Parameter, Random
from surgery.algebra.expr import WEIGHT, Expr
from surgery.algebra.kinds import SIZES
from surgery.algebra.rules import constant
from surgery.errors import Span, refuse
from surgery.language import syntax as ast


def of_all_sites(value: Expr) -> bool:
    """Whether a beginning is no one site's: a number, or what the W of all have in common."""
    if value.op == COMMON:
        return value.args == (WEIGHT,) and not names_in(cast(Size, value.attr("ridge"))) & SIZES
    return value.op == "number" and not names_in(constant(value)) & SIZES


def check_draw(call: ast.Call, row: Distribution) -> None:
    """Refuse a draw that does not name its arguments, or not all that it needs (E104)."""
    if call.arguments:
        message = f"the arguments of {call.function}() have names"
        refuse("E104", message, call.arguments[0].span, hint=f"it has: {', '.join(row.named)}")
    given = {k.name: k for k in call.keywords}
    missing = [n for n in row.arguments if row.told and n not in given]
    if missing:
        message = f"{call.function}() needs all its arguments"
        refuse("E104", message, call.span, hint=f"say {', '.join(f'{n} = …' for n in missing)}")
    if AFTER in given and "seed" not in given:
        message = f"`{AFTER}` is of the generator of a seed, and there is none"
        refuse("E104", message, given[AFTER].span, hint=f"say seed = …, or leave {AFTER} out")


def check_whole(item: ast.Declaration, p: Parameter) -> None:
    """Refuse whole numbers that would be trained, and places that are no pairs (E111)."""
    pairs = isinstance(p.beginning, Random) and p.beginning.distribution in PAIRS
    if item.trained and not pairs:
        message = f"`{item.name}` begins with whole numbers, which are not trained"
        refuse("E111", message, item.span, hint="declare it as `frozen`")
    if pairs and (item.trained or len(p.shape) != 2 or p.shape[0] != size(2)):
        refuse(
            "E111",
            f"`{item.name}` begins with places in a matrix",
            item.span,
            label="each is a row and a column, and is not trained",
            hint=f"declare it as `frozen {item.name}[2, n]`",
        )


def check_trained(item: ast.Declaration) -> None:
    """Refuse a learning rate of what is not trained (E139)."""
    if item.rate is not None and not item.trained:
        shared = "shared " if item.shared else ""
        message = f"`{item.name}` is not trained, and has a learning rate"
        hint = f"declare it as `{shared}train {item.name}`, or leave the rate out"
        refuse("E139", message, item.rate.span, hint=hint)


def positive(length: Size, span: Span) -> None:
    """Refuse a size that is known to be none (E111)."""
    value = length.number
    if value is not None and (value < 1 or value.denominator != 1):
        shown = scalars.plain(length)
        said = "" if span.text == str(shown) else f", and `{span.text}` is {shown}"
        message = f"a size must be a whole number from 1 on{said}"
        refuse("E111", message, span, hint="make it 1, 2, 3, …")
