"""Rewriting: identities that always hold and always help, and alternatives to be chosen by cost.

A rule takes an expression and returns a replacement or None; its algebra stands at the end of its
line. `make` is the one way to build an expression: it checks the shape, then simplifies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from surgery.algebra.expr import Attribute, Expr, Shape, node, number, zeros
from surgery.algebra.ops import OPS
from surgery.algebra.axes import Size, size

Rule = Callable[[Expr], "Expr | None"]


def make(op: str, *args: Expr, **attrs: Attribute) -> Expr:
    """The simplified expression `op(args; attrs)`. Raises `Mismatch` if the shapes do not fit."""
    shape = OPS[op].shape(args, attrs)
    return _simplified(node(op, args, shape, tuple(attrs.items())))


def rebuild(expr: Expr, args: tuple[Expr, ...]) -> Expr:
    """The same operator on other arguments, simplified anew."""
    if args == expr.args:
        return expr
    return make(expr.op, *args, **dict(expr.attrs))


def substitute(root: Expr, replacements: dict[Expr, Expr]) -> Expr:
    """`root` with leaves or whole subexpressions replaced."""
    memo = dict(replacements)

    def visit(expr: Expr) -> Expr:
        if expr not in memo:
            memo[expr] = rebuild(expr, tuple(map(visit, expr.args)))
        return memo[expr]

    return visit(root)


def _simplified(expr: Expr) -> Expr:
    for rule in _IDENTITIES.get(expr.op, ()):
        replacement = rule(expr)
        if replacement is not None:
            return replacement
    return expr


def is_zero(expr: Expr) -> bool:
    """Whether the expression is identically zero."""
    return expr.op == "zeros" or (expr.op == "number" and constant(expr) == 0)


def constant(expr: Expr) -> Size:
    """The value of a number."""
    value = expr.attr("value")
    assert isinstance(value, Size)
    return value


def _is_one(expr: Expr) -> bool:
    return expr.op == "number" and constant(expr) == size(1)


def _all_numbers(exprs: Iterable[Expr]) -> bool:
    return all(e.op == "number" for e in exprs)


# fmt: off
def _add(e: Expr) -> Expr | None:
    a, b = e.args
    if is_zero(a): return b if b.shape == e.shape else None                           # 0 + b = b
    if is_zero(b): return a if a.shape == e.shape else None                           # a + 0 = a
    if _all_numbers(e.args): return number(constant(a) + constant(b))
    if b.op == "neg": return make("sub", a, b.args[0])                                # a + -b = a - b
    if a.op == "neg": return make("sub", b, a.args[0])                                # -a + b = b - a
    if a.op == "sub" and a.args[1] is b: return a.args[0]                             # (a - b) + b = a
    return None


def _sub(e: Expr) -> Expr | None:
    a, b = e.args
    if a is b: return zeros(e.shape)                                                  # a - a = 0
    if is_zero(b): return a if a.shape == e.shape else None                           # a - 0 = a
    if is_zero(a): return make("neg", b) if b.shape == e.shape else None              # 0 - b = -b
    if _all_numbers(e.args): return number(constant(a) - constant(b))
    if b.op == "neg": return make("add", a, b.args[0])                                # a - -b = a + b
    if a.op == "add" and b in a.args: return a.args[1 - a.args.index(b)]              # (a + b) - b = a
    return None


def _neg(e: Expr) -> Expr | None:
    a = e.args[0]
    if is_zero(a): return a                                                           # -0 = 0
    if a.op == "neg": return a.args[0]                                                # --a = a
    if a.op == "number": return number(-constant(a))
    if a.op == "sub": return make("sub", a.args[1], a.args[0])                        # -(a - b) = b - a
    return None


def _mul(e: Expr) -> Expr | None:
    a, b = e.args
    if is_zero(a) or is_zero(b): return _zero_like(e)                                 # 0 * b = 0
    if _is_one(a): return b                                                           # 1 * b = b
    if _is_one(b): return a                                                           # a * 1 = a
    if _all_numbers(e.args): return number(constant(a) * constant(b))
    if a.op == "neg": return make("neg", make("mul", a.args[0], b))                   # -a * b = -(a * b)
    if b.op == "neg": return make("neg", make("mul", a, b.args[0]))                   # a * -b = -(a * b)
    if b.op == "number": return make("mul", b, a)                                     # a * 2 = 2 * a
    if a.op == "number" and b.op == "mul" and b.args[0].op == "number":
        return make("mul", number(constant(a) * constant(b.args[0])), b.args[1])      # 2 * (3 * a) = 6 * a
    return None


def _div(e: Expr) -> Expr | None:
    a, b = e.args
    if is_zero(a): return _zero_like(e)                                               # 0 / b = 0
    if _is_one(b): return a                                                           # a / 1 = a
    if _all_numbers(e.args): return number(constant(a) / constant(b))
    if b.op == "number" and constant(b).number is not None:
        return make("mul", number(1 / constant(b)), a)                                # a / 2 = 1/2 * a
    return None


def _matmul(e: Expr) -> Expr | None:
    a, b = e.args
    if is_zero(a) or is_zero(b): return zeros(e.shape)                                # 0 @ b = 0
    if a.op == "eye": return b                                                        # I @ b = b
    if b.op == "eye": return a                                                        # a @ I = a
    if a.op == "neg": return make("neg", make("matmul", a.args[0], b))                # -a @ b = -(a @ b)
    if b.op == "neg": return make("neg", make("matmul", a, b.args[0]))                # a @ -b = -(a @ b)
    return None


def _scale_matrix(e: Expr) -> Expr | None:
    v, m = e.args
    if is_zero(m) or is_zero(v): return zeros(e.shape)                                # 0 * m = 0
    if m.op == "neg": return make("neg", make(e.op, v, m.args[0]))                    # v * -m = -(v * m)
    return None


def _transpose(e: Expr) -> Expr | None:
    a = e.args[0]
    match a.op:
        case "transpose": return a.args[0]                                            # aᵀᵀ = a
        case "diag" | "eye" | "drop" | "householder": return a                        # symmetric
        case "cayley": return make("cayley", make("neg", a.args[0])) if _is_skew(a.args[0]) else None
        case "skew": return make("neg", a)                                            # Qᵀ = -Q
        case "neg": return make("neg", make("transpose", a.args[0]))                  # (-a)ᵀ = -(aᵀ)
        case "blockdiag": return make("blockdiag", make("transpose", a.args[0]))      # blockwise
        case "kron": return make("kron", *(make("transpose", x) for x in a.args))     # (a ⊗ b)ᵀ = aᵀ ⊗ bᵀ
        case "matmul" if len(a.args[1].shape) > 1:
            return make("matmul", make("transpose", a.args[1]), make("transpose", a.args[0]))  # (ab)ᵀ = bᵀaᵀ
        case "scale_rows": return make("scale_cols", a.args[0], make("transpose", a.args[1]))
        case "scale_cols": return make("scale_rows", a.args[0], make("transpose", a.args[1]))
        case _: return zeros(e.shape) if is_zero(a) else None


def _inverse(e: Expr) -> Expr | None:
    a = e.args[0]
    match a.op:
        case "inverse": return a.args[0]                                              # (a⁻¹)⁻¹ = a
        case "eye" | "householder": return a                                          # its own inverse
        case "drop": return make("eye", size=a.shape[0])                              # its value is I
        case "cayley": return make("cayley", make("neg", a.args[0]))                  # C(Q)⁻¹ = C(-Q)
        case "diag": return make("diag", make("div", number(1), a.args[0]))           # elementwise
        case "transpose": return make("transpose", make("inverse", a.args[0]))        # (aᵀ)⁻¹ = (a⁻¹)ᵀ
        case "blockdiag" if _square(a.args[0]):
            return make("blockdiag", make("inverse", a.args[0]))                      # blockwise
        case "kron" if all(map(_square, a.args)):
            return make("kron", *(make("inverse", x) for x in a.args))                # (a ⊗ b)⁻¹ = a⁻¹ ⊗ b⁻¹
        case "matmul" if all(map(_square, a.args)):
            return make("matmul", make("inverse", a.args[1]), make("inverse", a.args[0]))  # (ab)⁻¹ = b⁻¹a⁻¹
        case _: return None


def _drop(e: Expr) -> Expr | None:
    p = e.attr("p")
    if p == size(0): return make("eye", size=e.shape[0])                              # nothing is dropped
    return None
# fmt: on


def _is_skew(expr: Expr) -> bool:
    return expr.op == "skew" or (expr.op == "neg" and _is_skew(expr.args[0]))


def _square(expr: Expr) -> bool:
    return len(expr.shape) > 1 and expr.shape[-1] == expr.shape[-2]


def _zero_like(expr: Expr) -> Expr:
    return zeros(expr.shape) if expr.shape else number(0)


_IDENTITIES: dict[str, tuple[Rule, ...]] = {
    "add": (_add,),
    "sub": (_sub,),
    "neg": (_neg,),
    "mul": (_mul,),
    "div": (_div,),
    "matmul": (_matmul,),
    "scale_rows": (_scale_matrix,),
    "scale_cols": (_scale_matrix,),
    "scale": (_scale_matrix,),
    "transpose": (_transpose,),
    "inverse": (_inverse,),
    "drop": (_drop,),
}


# ---------------------------------------------------------------------------- alternatives


def alternatives(expr: Expr) -> tuple[Expr, ...]:
    """Other expressions of the same value, some of which may cost less."""
    return tuple(e for rule in _ALTERNATIVES.get(expr.op, ()) if (e := rule(expr)) is not None)


# fmt: off
def _scalar_into_right(e: Expr) -> Expr | None:
    s, m = e.args
    if not s.is_scalar or m.op != "matmul": return None
    return make("matmul", m.args[0], make("mul", s, m.args[1]))                       # s (a @ b) = a @ (s b)


def _scalar_into_left(e: Expr) -> Expr | None:
    s, m = e.args
    if not s.is_scalar or m.op != "matmul": return None
    return make("matmul", make("mul", s, m.args[0]), m.args[1])                       # s (a @ b) = (s a) @ b


def _scalar_into_tile(e: Expr) -> Expr | None:
    s, m = e.args
    if not s.is_scalar or m.op != "tile": return None
    return make("tile", make("mul", s, m.args[0]), **dict(m.attrs))                   # s tile(a) = tile(s a)


def _right_first(e: Expr) -> Expr | None:
    a, c = e.args
    if a.op != "matmul" or len(c.shape) != 2: return None
    return make("matmul", a.args[0], make("matmul", a.args[1], c))                    # (a @ b) @ c = a @ (b @ c)


def _left_first(e: Expr) -> Expr | None:
    a, c = e.args
    if c.op != "matmul" or len(c.args[1].shape) != 2: return None
    return make("matmul", make("matmul", a, c.args[0]), c.args[1])                    # a @ (b @ c) = (a @ b) @ c


def _rows_into_left(e: Expr) -> Expr | None:
    v, m = e.args
    if m.op != "matmul": return None
    return make("matmul", make("scale_rows", v, m.args[0]), m.args[1])                # v ∘ (a @ b) = (v ∘ a) @ b


def _columns_into_right(e: Expr) -> Expr | None:
    v, m = e.args
    if m.op != "matmul": return None
    return make("matmul", m.args[0], make("scale_cols", v, m.args[1]))                # (a @ b) ∘ v = a @ (b ∘ v)


def _factor_right(e: Expr) -> Expr | None:
    a, b = e.args
    if a.op != "matmul" or b.op != "matmul" or a.args[1] is not b.args[1]: return None
    return make("matmul", make(e.op, a.args[0], b.args[0]), a.args[1])                # a @ c + b @ c = (a + b) @ c


def _factor_left(e: Expr) -> Expr | None:
    a, b = e.args
    if a.op != "matmul" or b.op != "matmul" or a.args[0] is not b.args[0]: return None
    return make("matmul", a.args[0], make(e.op, a.args[1], b.args[1]))                # c @ a + c @ b = c @ (a + b)
# fmt: on


_ALTERNATIVES: dict[str, tuple[Rule, ...]] = {
    "mul": (_scalar_into_right, _scalar_into_left, _scalar_into_tile),
    "matmul": (_right_first, _left_first),
    "scale_rows": (_rows_into_left,),
    "scale_cols": (_columns_into_right,),
    "add": (_factor_right, _factor_left),
    "sub": (_factor_right, _factor_left),
}


def shape_of(op: str, args: tuple[Expr, ...], **attrs: Attribute) -> Shape:
    """The shape an operator would give. Raises `Mismatch`."""
    return OPS[op].shape(args, attrs)
